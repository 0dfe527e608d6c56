//! The health of the device: log page 02h (NVM Express 1.4, section 5.14.1.2).

use block_api::Health;
use iohost_driver::prelude::*;

use crate::Nvme;
use crate::admin::Asked;
use crate::identify::{u16_at, u64_at};
use crate::status::CommandError;

const LOG: u32 = 0x02;
const BYTES: u32 = 512;

impl Nvme {
    /// Answers with the health as it is now; callers that come meanwhile get the same answer.
    pub(crate) fn ask_for_health(&mut self, reply: Reply<Vec<u8>>) {
        self.health_calls.push(reply);
        if self.health_calls.len() == 1 {
            let address = self.admin.health.address();
            self.ask_for_log(Asked::Health, LOG, address, BYTES);
        }
    }

    /// The log was read, or not.
    pub(crate) fn health_has_come(&mut self, result: Result<u32, CommandError>) {
        let answer = match result {
            Ok(_) => Ok(parse(&self.admin.health.to_vec()).to_bytes()),
            Err(err) => {
                warn!(reason:% = err; "the health cannot be read");
                Err(IOReturn::DEVICE_ERROR)
            }
        };
        for reply in self.health_calls.drain(..) {
            reply.finish(answer.clone());
        }
    }
}

/// Figure 194. Numbers of 128 bits that do not fit are as large as can be.
fn parse(log: &[u8]) -> Health {
    let number = |at: usize| match u64_at(log, at + 8) {
        0 => u64_at(log, at),
        _ => u64::MAX,
    };
    Health {
        warnings: log[0],
        temperature: u16_at(log, 1),
        spare: log[3],
        spare_threshold: log[4],
        used: log[5],
        read_units: number(32),
        written_units: number(48),
        power_cycles: number(112),
        power_on_hours: number(128),
        unsafe_shutdowns: number(144),
        media_errors: number(160),
    }
}
