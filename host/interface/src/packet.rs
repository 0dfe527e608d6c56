//! The packets of a session: calls from the client, replies from the driver host, and what belongs
//! to actions, both ways.
//!
//! One packet of a `SOCK_SEQPACKET` socket each, in the machine's byte order (both ends run on
//! one machine): a header of 32 bytes, the scalars, the structure, and not a byte more.
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | u32 | magic: what kind of packet it is, see below |
//! | 4 | u32 | number of scalars |
//! | 8 | u32 | bytes of structure |
//! | 12 | i32 | reply: status; else: which scalars of a call are actions |
//! | 16 | u64 | call, memory, reply: the call's number, chosen by the client; offers: the offer's number, likewise; generations: which; else: the action's |
//! | 24 | u64 | call: selector; memory: its type; reply: which scalars are actions; taken: how many; offers: 1 for reading only, else 0; away: the last call that was begun |
//!
//! | magic | kind | from |
//! | --- | --- | --- |
//! | `IOC1` | a call | the client |
//! | `IOM1` | asks for memory that the driver offers, by type | the client |
//! | `IOF1` | offers memory, its file beside it, for the driver of any call to use | the client |
//! | `IOW1` | takes an offer back | the client |
//! | `IOR1` | a reply; beside the one to `IOM1`, the memory file | the driver host |
//! | `IOI1` | invokes an action that the receiver passed | both |
//! | `IOX1` | the last handle to an action that the receiver passed is gone | both |
//! | `IOT1` | invocations of the sender's action that it has taken | the client |
//! | `IOA1` | the driver host of that generation has died; the last call that it or an earlier one had begun | the daemon |
//! | `IOG1` | the driver host of that generation is there, and reads from the client's `IOG1` on; what it finds before that was meant for an earlier one | both |
//!
//! Which scalars are actions is a bit for each, bit 0 the first. Such a scalar is a number that
//! its sender gave the action in this session, never twice. The reply to `IOM1` has two scalars:
//! the bytes of the memory file beside it, and 1 if it is for reading only, else 0. Fields without
//! a meaning are zero; in `IOM1`, in offers and in the packets of actions that is checked.

use crate::{Arguments, IOReturn, PassedAction};

/// The longest packet there is.
pub const LONGEST: usize = HEADER + 8 * Arguments::MOST_SCALARS + Arguments::LONGEST_STRUCTURE;

const HEADER: usize = 32;
const CALL: u32 = u32::from_be_bytes(*b"IOC1");
const REPLY: u32 = u32::from_be_bytes(*b"IOR1");
const INVOKE: u32 = u32::from_be_bytes(*b"IOI1");
const RELEASE: u32 = u32::from_be_bytes(*b"IOX1");
const MAP: u32 = u32::from_be_bytes(*b"IOM1");
const OFFER: u32 = u32::from_be_bytes(*b"IOF1");
const WITHDRAW: u32 = u32::from_be_bytes(*b"IOW1");
/// What follows is the end of the connection, in order.
const GOODBYE: u32 = u32::from_be_bytes(*b"IOB1");
const TAKEN: u32 = u32::from_be_bytes(*b"IOT1");
const AWAY: u32 = u32::from_be_bytes(*b"IOA1");
const GENERATION: u32 = u32::from_be_bytes(*b"IOG1");

/// A packet from a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromClient {
    /// A call.
    Call(Call),
    /// Asks for memory that the driver offers.
    Map {
        /// The client's number for the request, which is one of a call.
        id: u64,
        /// Which memory: a number of the driver's.
        memory: u64,
    },
    /// Offers memory, whose file is beside the packet.
    Offer {
        /// The client's number for it.
        memory: u64,
        /// The driver may read only.
        read_only: bool,
    },
    /// Takes an offer back.
    Withdraw {
        /// The client's number for it.
        memory: u64,
    },
    /// The client closes the session; one that ends without this has died.
    Goodbye,
    /// Invokes an action of the driver's.
    Invoke(Invocation),
    /// The client holds an action of the driver's no more.
    Release {
        /// The driver host's number for it.
        action: u64,
    },
    /// The client took invocations of its own action, and has room for as many more.
    Taken {
        /// The client's number for it.
        action: u64,
        /// How many; not zero.
        count: u64,
    },
    /// What follows is meant for the driver host of this generation.
    Resumed {
        /// Which; the first one is 1, and has none of these.
        generation: u64,
    },
}

/// A packet from a driver host, or from the daemon in its absence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromDriver {
    /// A reply.
    Reply(ReplyPacket),
    /// Invokes an action of the client's.
    Invoke(Invocation),
    /// The driver holds an action of the client's no more.
    Release {
        /// The client's number for it.
        action: u64,
    },
    /// The driver host has died, and another one is on its way. From the daemon.
    Away {
        /// Which one died.
        generation: u64,
        /// The highest number of a call that was begun, in any generation; 0 for none.
        begun: u64,
    },
    /// The next driver host is there.
    Resumed {
        /// Which one.
        generation: u64,
    },
}

/// An invocation as it travels. There are no actions among its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// The number that the action's owner gave it.
    pub action: u64,
    /// The arguments.
    pub arguments: Arguments,
}

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
    /// Actions where there are no scalars, or in a kind of packet that has none.
    #[error("packet with actions {actions:#x} among {scalars} scalars")]
    Actions {
        /// A bit for each.
        actions: u64,
        /// Scalars in the packet.
        scalars: usize,
    },
    /// A field that has to be zero is not, or the other way round.
    #[error("packet of kind {magic:#010x} with {value:#x} at offset {offset}")]
    Field {
        /// What it starts with.
        magic: u32,
        /// Where the field is.
        offset: usize,
        /// What it holds.
        value: u64,
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

impl FromClient {
    /// Reads a packet from a client, of which nothing is believed.
    pub fn decode(packet: &[u8]) -> Result<Self, PacketFault> {
        match magic_of(packet)? {
            INVOKE => Ok(Self::Invoke(Invocation::decode(packet)?)),
            RELEASE => Ok(Self::Release { action: decode_release(packet)? }),
            MAP => {
                let (header, _) = decode_bare(MAP, packet)?;
                Ok(Self::Map { id: header.id, memory: header.last })
            }
            OFFER => {
                let (header, _) = decode_bare(OFFER, packet)?;
                let read_only = match header.last {
                    0 => false,
                    1 => true,
                    value => return Err(PacketFault::Field { magic: OFFER, offset: 24, value }),
                };
                Ok(Self::Offer { memory: header.id, read_only })
            }
            WITHDRAW => {
                let (header, _) = decode_bare(WITHDRAW, packet)?;
                header.has_zero_last(WITHDRAW)?;
                Ok(Self::Withdraw { memory: header.id })
            }
            GOODBYE => {
                let (header, _) = decode_bare(GOODBYE, packet)?;
                header.has_zero_last(GOODBYE)?;
                Ok(Self::Goodbye)
            }
            TAKEN => {
                let (header, _) = decode_bare(TAKEN, packet)?;
                let count = header.last;
                if count == 0 {
                    return Err(PacketFault::Field { magic: TAKEN, offset: 24, value: 0 });
                }
                Ok(Self::Taken { action: header.id, count })
            }
            GENERATION => Ok(Self::Resumed { generation: decode_resumed(packet)? }),
            _ => Ok(Self::Call(Call::decode(packet)?)),
        }
    }
}

impl FromDriver {
    /// Reads a packet from a driver host.
    pub fn decode(packet: &[u8]) -> Result<Self, PacketFault> {
        match magic_of(packet)? {
            INVOKE => Ok(Self::Invoke(Invocation::decode(packet)?)),
            RELEASE => Ok(Self::Release { action: decode_release(packet)? }),
            AWAY => {
                let (header, _) = decode_bare(AWAY, packet)?;
                Ok(Self::Away { generation: header.id, begun: header.last })
            }
            GENERATION => Ok(Self::Resumed { generation: decode_resumed(packet)? }),
            _ => Ok(Self::Reply(ReplyPacket::decode(packet)?)),
        }
    }
}

impl Call {
    /// The packet. `BAD_ARGUMENT` or `MESSAGE_TOO_LARGE` when the arguments exceed the limits.
    /// The scalars of actions hold their numbers already.
    pub fn encode(&self) -> Result<Vec<u8>, IOReturn> {
        self.arguments.check()?;
        let actions = bits(&self.arguments);
        Ok(encode(CALL, actions as i32, self.id, self.selector, &self.arguments))
    }

    /// Reads a packet from a client, of which nothing is believed.
    pub fn decode(packet: &[u8]) -> Result<Self, PacketFault> {
        let (header, mut arguments) = decode(CALL, packet)?;
        mark(&mut arguments, u64::from(header.status as u32))?;
        Ok(Self { id: header.id, selector: header.last, arguments })
    }
}

impl ReplyPacket {
    /// The packet. The answer's arguments are within their limits, as [`crate::Reply`] checked.
    /// The scalars of actions hold their numbers already.
    pub fn encode(&self) -> Vec<u8> {
        match &self.answer {
            Ok(arguments) => encode(REPLY, 0, self.id, bits(arguments), arguments),
            Err(status) => encode(REPLY, status.0, self.id, 0, &Arguments::default()),
        }
    }

    /// Reads a packet from a driver host.
    pub fn decode(packet: &[u8]) -> Result<Self, PacketFault> {
        let (header, mut arguments) = decode(REPLY, packet)?;
        mark(&mut arguments, header.last)?;
        let answer = IOReturn(header.status).result().map(|()| arguments);
        Ok(Self { id: header.id, answer })
    }
}

impl Invocation {
    /// The packet. `BAD_ARGUMENT` or `MESSAGE_TOO_LARGE` when the arguments exceed the limits,
    /// `UNSUPPORTED` when there are actions among them.
    pub fn encode(&self) -> Result<Vec<u8>, IOReturn> {
        self.arguments.check()?;
        if !self.arguments.actions.is_empty() {
            return Err(IOReturn::UNSUPPORTED);
        }
        Ok(encode(INVOKE, 0, self.action, 0, &self.arguments))
    }

    fn decode(packet: &[u8]) -> Result<Self, PacketFault> {
        let (header, arguments) = decode(INVOKE, packet)?;
        header.has_zero_status(INVOKE)?;
        header.has_zero_last(INVOKE)?;
        Ok(Self { action: header.id, arguments })
    }
}

/// The packet that says that nobody here holds an action of the receiver's any more.
pub fn encode_release(action: u64) -> Vec<u8> {
    encode(RELEASE, 0, action, 0, &Arguments::default())
}

/// The packet that says that invocations of the sender's action were taken.
pub fn encode_taken(action: u64, count: u64) -> Vec<u8> {
    encode(TAKEN, 0, action, count, &Arguments::default())
}

/// The packet that says that the client closes the session.
pub fn encode_goodbye() -> Vec<u8> {
    encode(GOODBYE, 0, 0, 0, &Arguments::default())
}

/// The packet that asks for memory that the driver offers.
pub fn encode_map(id: u64, memory: u64) -> Vec<u8> {
    encode(MAP, 0, id, memory, &Arguments::default())
}

/// The packet that offers memory; its file goes beside it.
pub fn encode_offer(memory: u64, read_only: bool) -> Vec<u8> {
    encode(OFFER, 0, memory, read_only.into(), &Arguments::default())
}

/// The packet that takes an offer back.
pub fn encode_withdraw(memory: u64) -> Vec<u8> {
    encode(WITHDRAW, 0, memory, 0, &Arguments::default())
}

/// The packet by which the daemon says that a driver host has died.
pub fn encode_away(generation: u64, begun: u64) -> Vec<u8> {
    encode(AWAY, 0, generation, begun, &Arguments::default())
}

/// The packet that begins a generation, from either side.
pub fn encode_resumed(generation: u64) -> Vec<u8> {
    encode(GENERATION, 0, generation, 0, &Arguments::default())
}

fn decode_resumed(packet: &[u8]) -> Result<u64, PacketFault> {
    let (header, _) = decode_bare(GENERATION, packet)?;
    header.has_zero_last(GENERATION)?;
    Ok(header.id)
}

fn decode_release(packet: &[u8]) -> Result<u64, PacketFault> {
    let (header, _) = decode_bare(RELEASE, packet)?;
    header.has_zero_last(RELEASE)?;
    Ok(header.id)
}

/// Which scalars are actions, a bit for each.
fn bits(arguments: &Arguments) -> u64 {
    arguments.actions.iter().fold(0, |bits, action| bits | 1 << action.scalar)
}

/// Notes which scalars are actions.
fn mark(arguments: &mut Arguments, actions: u64) -> Result<(), PacketFault> {
    let scalars = arguments.scalars.len();
    // At most 16 scalars, so the shift is one.
    if actions >> scalars != 0 {
        return Err(PacketFault::Actions { actions, scalars });
    }
    let marked = (0..scalars).filter(|scalar| actions >> scalar & 1 == 1);
    arguments.actions = marked.map(|scalar| PassedAction { scalar, target: None }).collect();
    Ok(())
}

struct Header {
    status: i32,
    id: u64,
    /// What stands at offset 24.
    last: u64,
}

impl Header {
    fn has_zero_status(&self, magic: u32) -> Result<(), PacketFault> {
        let value = u64::from(self.status as u32);
        if value == 0 { Ok(()) } else { Err(PacketFault::Field { magic, offset: 12, value }) }
    }

    fn has_zero_last(&self, magic: u32) -> Result<(), PacketFault> {
        let value = self.last;
        if value == 0 { Ok(()) } else { Err(PacketFault::Field { magic, offset: 24, value }) }
    }
}

fn encode(magic: u32, status: i32, id: u64, last: u64, arguments: &Arguments) -> Vec<u8> {
    let Arguments { scalars, structure, .. } = arguments;
    let mut packet = Vec::with_capacity(HEADER + 8 * scalars.len() + structure.len());
    packet.extend(magic.to_ne_bytes());
    packet.extend((scalars.len() as u32).to_ne_bytes());
    packet.extend((structure.len() as u32).to_ne_bytes());
    packet.extend(status.to_ne_bytes());
    packet.extend(id.to_ne_bytes());
    packet.extend(last.to_ne_bytes());
    packet.extend(scalars.iter().flat_map(|scalar| scalar.to_ne_bytes()));
    packet.extend(structure);
    packet
}

/// A packet with neither scalars nor structure.
fn decode_bare(expected: u32, packet: &[u8]) -> Result<(Header, Arguments), PacketFault> {
    let (header, arguments) = decode(expected, packet)?;
    let Arguments { scalars, structure, .. } = &arguments;
    if !scalars.is_empty() || !structure.is_empty() {
        let (scalars, bytes) = (scalars.len() as u32, structure.len() as u32);
        return Err(PacketFault::Limits { scalars, bytes });
    }
    header.has_zero_status(expected)?;
    Ok((header, arguments))
}

fn magic_of(packet: &[u8]) -> Result<u32, PacketFault> {
    let magic = packet.first_chunk().ok_or(PacketFault::Short { len: packet.len() })?;
    Ok(u32::from_ne_bytes(*magic))
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
        actions: Vec::new(),
    };
    let header = Header {
        status: u32_at(header, 12) as i32,
        id: u64_at(header, 16),
        last: u64_at(header, 24),
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
        let arguments =
            Arguments { scalars: vec![5, 6], structure: b"abc".to_vec(), ..Default::default() };
        Call { id: 1, selector: 2, arguments }
    }

    #[test]
    fn offers_of_memory_come_back_as_they_went_and_other_fields_are_zero() {
        for read_only in [false, true] {
            let packet = encode_offer(7, read_only);
            assert_eq!(FromClient::decode(&packet), Ok(FromClient::Offer { memory: 7, read_only }));
        }
        assert_eq!(FromClient::decode(&encode_goodbye()), Ok(FromClient::Goodbye));
        let packet = encode_withdraw(7);
        assert_eq!(FromClient::decode(&packet), Ok(FromClient::Withdraw { memory: 7 }));
        for (mut packet, value) in [(encode_offer(7, true), 2), (encode_withdraw(7), 1)] {
            packet[24] = value;
            let fault = FromClient::decode(&packet).unwrap_err();
            assert!(matches!(fault, PacketFault::Field { offset: 24, .. }), "{fault}");
        }
        let mut packet = encode_offer(7, false);
        packet[12] = 1;
        let fault = FromClient::decode(&packet).unwrap_err();
        assert!(matches!(fault, PacketFault::Field { offset: 12, .. }), "{fault}");
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

    #[test]
    fn the_packets_of_actions_come_back_as_they_went() {
        let invocation = Invocation { action: 7, arguments: call().arguments };
        let packet = invocation.encode().unwrap();
        assert_eq!(FromClient::decode(&packet), Ok(FromClient::Invoke(invocation.clone())));
        assert_eq!(FromDriver::decode(&packet), Ok(FromDriver::Invoke(invocation)));
        let release = encode_release(8);
        assert_eq!(FromClient::decode(&release), Ok(FromClient::Release { action: 8 }));
        assert_eq!(FromDriver::decode(&release), Ok(FromDriver::Release { action: 8 }));
        let taken = encode_taken(9, 3);
        assert_eq!(FromClient::decode(&taken), Ok(FromClient::Taken { action: 9, count: 3 }));
        assert!(FromDriver::decode(&taken).is_err(), "a driver host takes none");

        let map = encode_map(5, 6);
        assert_eq!(FromClient::decode(&map), Ok(FromClient::Map { id: 5, memory: 6 }));
        assert!(FromDriver::decode(&map).is_err(), "a driver host asks for none");
        let mut wrong = map;
        wrong[12] = 1;
        assert!(FromClient::decode(&wrong).is_err(), "a field that has to be zero");

        let mut passing = call();
        passing.arguments.actions = vec![PassedAction { scalar: 1, target: None }];
        assert_eq!(Call::decode(&passing.encode().unwrap()), Ok(passing.clone()));
        let reply = ReplyPacket { id: 9, answer: Ok(passing.arguments) };
        assert_eq!(ReplyPacket::decode(&reply.encode()), Ok(reply));
    }

    #[test]
    fn the_packets_between_generations_come_back_as_they_went() {
        let away = encode_away(3, 7);
        assert_eq!(FromDriver::decode(&away), Ok(FromDriver::Away { generation: 3, begun: 7 }));
        assert!(FromClient::decode(&away).is_err(), "a client cannot say that a driver died");
        let resumed = encode_resumed(4);
        assert_eq!(FromDriver::decode(&resumed), Ok(FromDriver::Resumed { generation: 4 }));
        assert_eq!(FromClient::decode(&resumed), Ok(FromClient::Resumed { generation: 4 }));
    }

    #[test]
    fn a_field_that_has_to_be_zero_is_looked_at() {
        let packets = [
            encode_release(1),
            encode_resumed(1),
            Invocation { action: 1, arguments: call().arguments }.encode().unwrap(),
        ];
        for packet in packets {
            assert!(FromClient::decode(&packet).is_ok());
            for offset in [12, 24] {
                let mut wrong = packet.clone();
                wrong[offset] = 1;
                assert!(FromClient::decode(&wrong).is_err(), "offset {offset}");
            }
            assert!(FromClient::decode(&packet[..packet.len() - 1]).is_err());
            assert!(FromClient::decode(&packet[..2]).is_err());
        }
        assert!(FromClient::decode(&encode_taken(1, 0)).is_err());
        let mut marked = call().encode().unwrap();
        marked[12] = 0b100;
        let fault = PacketFault::Actions { actions: 4, scalars: 2 };
        assert_eq!(FromClient::decode(&marked), Err(fault), "there is no third scalar");
    }
}
