//! The packets of a session: calls from the client, replies from the driver host.
//!
//! One packet of a `SOCK_SEQPACKET` socket each, in the machine's byte order (both ends run on
//! one machine): a header of 32 bytes, the scalars, the structure, and not a byte more.
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | u32 | magic: `IOC1` for a call, `IOR1` for a reply |
//! | 4 | u32 | number of scalars |
//! | 8 | u32 | bytes of structure |
//! | 12 | i32 | reply: status; call: zero |
//! | 16 | u64 | the call's number, chosen by the client, returned in the reply |
//! | 24 | u64 | call: selector; reply: zero |

use crate::{Arguments, IOReturn};

/// The longest packet there is.
pub const LONGEST: usize = HEADER + 8 * Arguments::MOST_SCALARS + Arguments::LONGEST_STRUCTURE;

const HEADER: usize = 32;
const CALL: u32 = u32::from_be_bytes(*b"IOC1");
const REPLY: u32 = u32::from_be_bytes(*b"IOR1");

/// A call as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The client's number for it.
    pub id: u64,
    /// The method.
    pub selector: u64,
    /// Its arguments.
    pub arguments: Arguments,
}

/// A reply as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyPacket {
    /// The number of the call it answers.
    pub id: u64,
    /// The answer.
    pub answer: Result<Arguments, IOReturn>,
}

/// Why a packet is none of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PacketFault {
    /// Not even a header.
    #[error("packet of {len} bytes, a header has {HEADER}")]
    Short {
        /// Bytes that came.
        len: usize,
    },
    /// Another kind of packet, or garbage.
    #[error("packet starts with {found:#010x}, expected {expected:#010x}")]
    Magic {
        /// What it starts with.
        found: u32,
        /// What it should start with.
        expected: u32,
    },
    /// More scalars or bytes than a call can have.
    #[error("packet with {scalars} scalars and {bytes} bytes of structure")]
    Limits {
        /// Scalars announced.
        scalars: u32,
        /// Bytes announced.
        bytes: u32,
    },
    /// The header announces another length than the packet has.
    #[error("packet of {len} bytes whose header announces {announced}")]
    Length {
        /// Bytes that came.
        len: usize,
        /// Bytes announced.
        announced: usize,
    },
}

impl Call {
    /// The packet. `BAD_ARGUMENT` or `MESSAGE_TOO_LARGE` when the arguments exceed the limits.
    pub fn encode(&self) -> Result<Vec<u8>, IOReturn> {
        self.arguments.check()?;
        Ok(encode(CALL, 0, self.id, self.selector, &self.arguments))
    }

    /// Reads a packet from a client, of which nothing is believed.
    pub fn decode(packet: &[u8]) -> Result<Self, PacketFault> {
        let (header, arguments) = decode(CALL, packet)?;
        Ok(Self { id: header.id, selector: header.selector, arguments })
    }
}

impl ReplyPacket {
    /// The packet. The answer's arguments are within their limits, as [`crate::Reply`] checked.
    pub fn encode(&self) -> Vec<u8> {
        match &self.answer {
            Ok(arguments) => encode(REPLY, 0, self.id, 0, arguments),
            Err(status) => encode(REPLY, status.0, self.id, 0, &Arguments::default()),
        }
    }

    /// Reads a packet from a driver host.
    pub fn decode(packet: &[u8]) -> Result<Self, PacketFault> {
        let (header, arguments) = decode(REPLY, packet)?;
        let answer = IOReturn(header.status).result().map(|()| arguments);
        Ok(Self { id: header.id, answer })
    }
}

struct Header {
    status: i32,
    id: u64,
    selector: u64,
}

fn encode(magic: u32, status: i32, id: u64, selector: u64, arguments: &Arguments) -> Vec<u8> {
    let Arguments { scalars, structure } = arguments;
    let mut packet = Vec::with_capacity(HEADER + 8 * scalars.len() + structure.len());
    packet.extend(magic.to_ne_bytes());
    packet.extend((scalars.len() as u32).to_ne_bytes());
    packet.extend((structure.len() as u32).to_ne_bytes());
    packet.extend(status.to_ne_bytes());
    packet.extend(id.to_ne_bytes());
    packet.extend(selector.to_ne_bytes());
    packet.extend(scalars.iter().flat_map(|scalar| scalar.to_ne_bytes()));
    packet.extend(structure);
    packet
}

fn decode(expected: u32, packet: &[u8]) -> Result<(Header, Arguments), PacketFault> {
    let Some((header, rest)) = packet.split_first_chunk::<HEADER>() else {
        return Err(PacketFault::Short { len: packet.len() });
    };
    let found = u32_at(header, 0);
    if found != expected {
        return Err(PacketFault::Magic { found, expected });
    }
    let (scalars, bytes) = (u32_at(header, 4), u32_at(header, 8));
    if scalars as usize > Arguments::MOST_SCALARS || bytes as usize > Arguments::LONGEST_STRUCTURE {
        return Err(PacketFault::Limits { scalars, bytes });
    }
    let announced = HEADER + 8 * scalars as usize + bytes as usize;
    if announced != packet.len() {
        return Err(PacketFault::Length { len: packet.len(), announced });
    }
    let (scalars, structure) = rest.split_at(8 * scalars as usize);
    let (scalars, _) = scalars.as_chunks::<8>();
    let arguments = Arguments {
        scalars: scalars.iter().map(|bytes| u64::from_ne_bytes(*bytes)).collect(),
        structure: structure.to_vec(),
    };
    let header = Header {
        status: u32_at(header, 12) as i32,
        id: u64_at(header, 16),
        selector: u64_at(header, 24),
    };
    Ok((header, arguments))
}

fn u32_at(header: &[u8; HEADER], offset: usize) -> u32 {
    u32::from_ne_bytes(*header[offset..].first_chunk().expect("inside the header"))
}

fn u64_at(header: &[u8; HEADER], offset: usize) -> u64 {
    u64::from_ne_bytes(*header[offset..].first_chunk().expect("inside the header"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Call {
        let arguments = Arguments { scalars: vec![5, 6], structure: b"abc".to_vec() };
        Call { id: 1, selector: 2, arguments }
    }

    #[test]
    fn calls_and_replies_come_back_as_they_went() {
        assert_eq!(Call::decode(&call().encode().unwrap()), Ok(call()));
        for answer in [Ok(call().arguments), Err(IOReturn::BUSY)] {
            let reply = ReplyPacket { id: 9, answer };
            assert_eq!(ReplyPacket::decode(&reply.encode()), Ok(reply));
        }
    }

    #[test]
    fn every_cut_and_every_extra_byte_is_noticed() {
        let packet = call().encode().unwrap();
        for len in 0..packet.len() {
            assert!(Call::decode(&packet[..len]).is_err(), "cut to {len}");
        }
        assert!(Call::decode(&[&packet[..], &[0]].concat()).is_err());
    }

    #[test]
    fn announced_sizes_are_not_believed() {
        let mut packet = call().encode().unwrap();
        packet[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        let fault = PacketFault::Limits { scalars: u32::MAX, bytes: 3 };
        assert_eq!(Call::decode(&packet), Err(fault));
    }
}
