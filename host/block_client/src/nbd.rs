//! A disk for programs that speak NBD: `qemu`, `nbd-client`, `nbdcopy`, the kernel.
//!
//! Source: the NBD protocol (`doc/proto.md` of NetworkBlockDevice/nbd), fixed newstyle negotiation
//! and simple replies. One export, whatever name a client asks for. All numbers are big endian.
//!
//! One request is done after the other, each in as many requests of the disk at a time as
//! [`BlockDevice`] has under way.

use std::io::{self, Read, Write};

use block_api::{Disk, Status};

use crate::{BlockDevice, BlockError};

/// What is exported: a [`BlockDevice`], or whatever a test has instead.
pub trait Export {
    /// What the disk is.
    fn info(&self) -> &Disk;
    /// As the methods of [`BlockDevice`].
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<(), BlockError>;
    /// Likewise.
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), BlockError>;
    /// Likewise.
    fn flush(&mut self) -> Result<(), BlockError>;
    /// Likewise.
    fn discard(&mut self, offset: u64, length: u64) -> Result<(), BlockError>;
    /// Likewise.
    fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), BlockError>;
}

impl Export for BlockDevice {
    fn info(&self) -> &Disk {
        BlockDevice::info(self)
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<(), BlockError> {
        BlockDevice::read(self, offset, data)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        BlockDevice::write(self, offset, data)
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        BlockDevice::flush(self)
    }

    fn discard(&mut self, offset: u64, length: u64) -> Result<(), BlockError> {
        BlockDevice::discard(self, offset, length)
    }

    fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), BlockError> {
        BlockDevice::write_zeroes(self, offset, length)
    }
}

/// The most bytes of one request; what the protocol has every server take.
const MOST_BYTES: u32 = 32 << 20;

/// The most bytes of an option, which are names and numbers.
const MOST_OPTION: u32 = 64 << 10;

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake: fixed newstyle, and no zeroes after an export's name; of server and client alike.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const OPTION_EXPORT_NAME: u32 = 1;
const OPTION_ABORT: u32 = 2;
const OPTION_LIST: u32 = 3;
const OPTION_INFO: u32 = 6;
const OPTION_GO: u32 = 7;

const ACKNOWLEDGED: u32 = 1;
const SERVER: u32 = 2;
const INFORMATION: u32 = 3;
const UNSUPPORTED: u32 = 0x8000_0001;
const INVALID: u32 = 0x8000_0003;

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
const COMMAND_TRIM: u16 = 4;
const COMMAND_WRITE_ZEROES: u16 = 6;

/// "Force unit access", of a command.
const THROUGH: u16 = 1;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

/// Serves one client until it leaves. Blocks.
///
/// What the disk refuses the client is told, and the conversation goes on.
///
/// Errors: what the stream says; `InvalidData` for a client that does not speak the protocol.
pub fn serve(stream: impl Read + Write, export: &mut impl Export) -> io::Result<()> {
    let mut client = Client { stream, export };
    if client.negotiate()? { client.transmit() } else { Ok(()) }
}

struct Client<'a, S, E> {
    stream: S,
    export: &'a mut E,
}

impl<S: Read + Write, E: Export> Client<'_, S, E> {
    /// Whether the client wants to go on to requests.
    fn negotiate(&mut self) -> io::Result<bool> {
        let mut greeting = b"NBDMAGICIHAVEOPT".to_vec();
        greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        self.stream.write_all(&greeting)?;
        let flags = u32::from_be_bytes(self.take()?);
        if flags & u32::from(FIXED_NEWSTYLE) == 0 {
            return Err(broken(format!("a client with flags {flags:#x}")));
        }
        let no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        loop {
            let magic = u64::from_be_bytes(self.take()?);
            let option = u32::from_be_bytes(self.take()?);
            let len = u32::from_be_bytes(self.take()?);
            if magic != OPTION_MAGIC || len > MOST_OPTION {
                return Err(broken(format!("option {option} with magic {magic:#x}, {len} bytes")));
            }
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data)?;
            match option {
                OPTION_EXPORT_NAME => {
                    let mut answer = self.size_and_flags();
                    if !no_zeroes {
                        answer.extend([0; 124]);
                    }
                    self.stream.write_all(&answer)?;
                    return Ok(true);
                }
                OPTION_INFO | OPTION_GO => match wanted_information(&data) {
                    Some(wanted) => {
                        self.inform(option, &wanted)?;
                        if option == OPTION_GO {
                            return Ok(true);
                        }
                    }
                    None => self.answer(option, INVALID, b"not well formed")?,
                },
                OPTION_LIST => {
                    let name = format!("disk{}", self.export.info().number);
                    let mut entry = (name.len() as u32).to_be_bytes().to_vec();
                    entry.extend(name.as_bytes());
                    self.answer(option, SERVER, &entry)?;
                    self.answer(option, ACKNOWLEDGED, &[])?;
                }
                OPTION_ABORT => {
                    // The client may be gone already.
                    let _ = self.answer(option, ACKNOWLEDGED, &[]);
                    return Ok(false);
                }
                _ => self.answer(option, UNSUPPORTED, &[])?,
            }
        }
    }

    /// Size and flags always, the sizes of blocks to who asks for them.
    fn inform(&mut self, option: u32, wanted: &[u16]) -> io::Result<()> {
        const EXPORT: u16 = 0;
        const BLOCK_SIZE: u16 = 3;
        let mut export = EXPORT.to_be_bytes().to_vec();
        export.extend(self.size_and_flags());
        self.answer(option, INFORMATION, &export)?;
        if wanted.contains(&BLOCK_SIZE) {
            let block = self.export.info().block;
            let mut sizes = BLOCK_SIZE.to_be_bytes().to_vec();
            for size in [block, block.max(4096), MOST_BYTES] {
                sizes.extend(size.to_be_bytes());
            }
            self.answer(option, INFORMATION, &sizes)?;
        }
        self.answer(option, ACKNOWLEDGED, &[])
    }

    fn size_and_flags(&self) -> Vec<u8> {
        const HAS_FLAGS: u16 = 1;
        const READ_ONLY: u16 = 1 << 1;
        const FLUSH: u16 = 1 << 2;
        const FORCE_UNIT_ACCESS: u16 = 1 << 3;
        const TRIM: u16 = 1 << 5;
        const WRITE_ZEROES: u16 = 1 << 6;
        let disk = self.export.info();
        let mut flags = HAS_FLAGS | FLUSH | FORCE_UNIT_ACCESS;
        for (flag, is_so) in [
            (READ_ONLY, disk.is_read_only),
            (TRIM, disk.can_discard),
            (WRITE_ZEROES, disk.can_write_zeroes),
        ] {
            flags |= if is_so { flag } else { 0 };
        }
        let mut answer = disk.bytes().to_be_bytes().to_vec();
        answer.extend(flags.to_be_bytes());
        answer
    }

    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut reply = REPLY_MAGIC.to_be_bytes().to_vec();
        reply.extend(option.to_be_bytes());
        reply.extend(kind.to_be_bytes());
        reply.extend((data.len() as u32).to_be_bytes());
        reply.extend(data);
        self.stream.write_all(&reply)
    }

    fn transmit(&mut self) -> io::Result<()> {
        let mut data = Vec::new();
        loop {
            let magic = match self.take() {
                Ok(magic) => u32::from_be_bytes(magic),
                // Leaving without a word is what many do.
                Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(err) => return Err(err),
            };
            if magic != REQUEST_MAGIC {
                return Err(broken(format!("a request with magic {magic:#x}")));
            }
            let flags = u16::from_be_bytes(self.take()?);
            let command = u16::from_be_bytes(self.take()?);
            let cookie: [u8; 8] = self.take()?;
            let offset = u64::from_be_bytes(self.take()?);
            let length = u32::from_be_bytes(self.take()?);
            let has_data = matches!(command, COMMAND_READ | COMMAND_WRITE);
            if has_data && length > MOST_BYTES {
                if command == COMMAND_WRITE {
                    return Err(broken(format!("{length} bytes to write at once")));
                }
                self.reply(cookie, EOVERFLOW, &[])?;
                continue;
            }
            data.resize(if has_data { length as usize } else { 0 }, 0);
            let done = match command {
                COMMAND_READ => self.export.read(offset, &mut data),
                COMMAND_WRITE => {
                    self.stream.read_exact(&mut data)?;
                    self.export.write(offset, &data)
                }
                COMMAND_DISCONNECT => return Ok(()),
                COMMAND_FLUSH => self.export.flush(),
                COMMAND_TRIM => self.export.discard(offset, length.into()),
                COMMAND_WRITE_ZEROES => self.export.write_zeroes(offset, length.into()),
                _ => {
                    self.reply(cookie, EINVAL, &[])?;
                    continue;
                }
            };
            let is_through = flags & THROUGH != 0 && command != COMMAND_READ;
            let done = done.and_then(|()| if is_through { self.export.flush() } else { Ok(()) });
            match done {
                Ok(()) if command == COMMAND_READ => self.reply(cookie, 0, &data)?,
                Ok(()) => self.reply(cookie, 0, &[])?,
                Err(err) => self.reply(cookie, errno(&err), &[])?,
            }
        }
    }

    fn reply(&mut self, cookie: [u8; 8], error: u32, data: &[u8]) -> io::Result<()> {
        let mut header = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        header.extend(error.to_be_bytes());
        header.extend(cookie);
        self.stream.write_all(&header)?;
        self.stream.write_all(data)
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// What a client asks to be told: the numbers behind the export's name, if it is well formed.
fn wanted_information(data: &[u8]) -> Option<Vec<u16>> {
    let (len, rest) = data.split_first_chunk()?;
    let (_name, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let (count, rest) = rest.split_first_chunk()?;
    let numbers = rest.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
    (rest.len() == usize::from(u16::from_be_bytes(*count)) * 2).then(|| numbers.collect())
}

/// The protocol's number for a failure.
fn errno(err: &BlockError) -> u32 {
    match err {
        BlockError::Failed(failure) => match failure.status {
            Status::ReadOnly => EPERM,
            Status::OutOfRange => ENOSPC,
            Status::NotAligned | Status::Malformed => EINVAL,
            Status::Unsupported => ENOTSUP,
            Status::Gone => ESHUTDOWN,
            _ => EIO,
        },
        BlockError::Queue(_) => ESHUTDOWN,
        _ => EIO,
    }
}

fn broken(words: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use block_api::Failure;

    use super::*;

    /// 64 blocks of 512 bytes, of which the last one is bad.
    struct Fake {
        disk: Disk,
        bytes: Vec<u8>,
        flushes: u32,
    }

    impl Fake {
        fn new() -> Self {
            let disk =
                Disk { number: 1, block: 512, blocks: 64, can_discard: true, ..Disk::default() };
            Self { disk, bytes: vec![0; 64 * 512], flushes: 0 }
        }

        fn part(&mut self, offset: u64, length: usize) -> Result<&mut [u8], BlockError> {
            let end = offset as usize + length;
            if end > 64 * 512 {
                return Err(Failure::new(Status::OutOfRange, "").into());
            }
            if end > 63 * 512 {
                return Err(Failure::new(Status::Medium, "").into());
            }
            Ok(&mut self.bytes[offset as usize..end])
        }
    }

    impl Export for Fake {
        fn info(&self) -> &Disk {
            &self.disk
        }

        fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<(), BlockError> {
            data.copy_from_slice(self.part(offset, data.len())?);
            Ok(())
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
            self.part(offset, data.len())?.copy_from_slice(data);
            Ok(())
        }

        fn flush(&mut self) -> Result<(), BlockError> {
            self.flushes += 1;
            Ok(())
        }

        fn discard(&mut self, offset: u64, length: u64) -> Result<(), BlockError> {
            self.part(offset, length as usize)?.fill(0);
            Ok(())
        }

        fn write_zeroes(&mut self, _: u64, _: u64) -> Result<(), BlockError> {
            Err(Failure::new(Status::Unsupported, "").into())
        }
    }

    /// A client, and the server on a thread, which gives the disk back.
    fn connect() -> (UnixStream, thread::JoinHandle<(io::Result<()>, Fake)>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut fake = Fake::new();
            (serve(&theirs, &mut fake), fake)
        });
        (ours, server)
    }

    fn take<const N: usize>(stream: &mut UnixStream) -> [u8; N] {
        let mut bytes = [0; N];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn greet(stream: &mut UnixStream) {
        assert_eq!(&take::<18>(stream), b"NBDMAGICIHAVEOPT\x00\x03");
        stream.write_all(&3_u32.to_be_bytes()).unwrap();
    }

    fn option(stream: &mut UnixStream, option: u32, data: &[u8]) {
        stream.write_all(&OPTION_MAGIC.to_be_bytes()).unwrap();
        stream.write_all(&option.to_be_bytes()).unwrap();
        stream.write_all(&(data.len() as u32).to_be_bytes()).unwrap();
        stream.write_all(data).unwrap();
    }

    /// Kind and data of the server's answer.
    fn answer(stream: &mut UnixStream, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(take(stream), REPLY_MAGIC.to_be_bytes());
        assert_eq!(take(stream), option.to_be_bytes());
        let kind = u32::from_be_bytes(take(stream));
        let mut data = vec![0; u32::from_be_bytes(take(stream)) as usize];
        stream.read_exact(&mut data).unwrap();
        (kind, data)
    }

    /// The error of a request, and what it read.
    fn request(
        stream: &mut UnixStream,
        [flags, command]: [u16; 2],
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> (u32, Vec<u8>) {
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(*b"a cookie");
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        stream.write_all(&request).unwrap();
        assert_eq!(take(stream), SIMPLE_REPLY_MAGIC.to_be_bytes());
        let error = u32::from_be_bytes(take(stream));
        assert_eq!(&take::<8>(stream), b"a cookie");
        let expected = if command == COMMAND_READ && error == 0 { length } else { 0 };
        let mut read = vec![0; expected as usize];
        stream.read_exact(&mut read).unwrap();
        (error, read)
    }

    #[test]
    fn a_client_negotiates_reads_writes_and_leaves() {
        let (mut stream, server) = connect();
        greet(&mut stream);
        option(&mut stream, 8, &[]);
        assert_eq!(answer(&mut stream, 8), (UNSUPPORTED, vec![]), "structured replies");
        option(&mut stream, OPTION_LIST, &[]);
        assert_eq!(answer(&mut stream, OPTION_LIST), (SERVER, b"\0\0\0\x05disk1".to_vec()));
        assert_eq!(answer(&mut stream, OPTION_LIST).0, ACKNOWLEDGED);
        option(&mut stream, OPTION_GO, b"\0\0\0\x09x");
        assert_eq!(answer(&mut stream, OPTION_GO).0, INVALID);
        option(&mut stream, OPTION_GO, b"\0\0\0\x04name\0\x01\0\x03");
        let (kind, export) = answer(&mut stream, OPTION_GO);
        assert_eq!((kind, &export[2..10]), (INFORMATION, &(64 * 512_u64).to_be_bytes()[..]));
        assert_eq!(export[10..12], 0b10_1101_u16.to_be_bytes(), "flush, FUA, trim");
        let (_, sizes) = answer(&mut stream, OPTION_GO);
        assert_eq!(sizes[..6], [0, 3, 0, 0, 2, 0]);
        assert_eq!(answer(&mut stream, OPTION_GO).0, ACKNOWLEDGED);

        let data = [7; 1024];
        let write = [THROUGH, COMMAND_WRITE];
        assert_eq!(request(&mut stream, write, 512, 1024, &data).0, 0);
        let read = [0, COMMAND_READ];
        assert_eq!(request(&mut stream, read, 512, 1024, &[]), (0, data.to_vec()));
        assert_eq!(request(&mut stream, [0, COMMAND_TRIM], 512, 512, &[]).0, 0);
        assert_eq!(request(&mut stream, read, 512, 512, &[]), (0, vec![0; 512]));
        assert_eq!(request(&mut stream, [0, COMMAND_FLUSH], 0, 0, &[]).0, 0);
        assert_eq!(request(&mut stream, [0, COMMAND_WRITE_ZEROES], 0, 512, &[]).0, ENOTSUP);
        assert_eq!(request(&mut stream, read, 63 * 512, 512, &[]).0, EIO);
        assert_eq!(request(&mut stream, read, 1 << 40, 512, &[]).0, ENOSPC);
        assert_eq!(request(&mut stream, read, 0, u32::MAX, &[]).0, EOVERFLOW);
        assert_eq!(request(&mut stream, [0, 99], 0, 0, &[]).0, EINVAL);
        drop(stream);
        let (ended, fake) = server.join().unwrap();
        ended.unwrap();
        assert_eq!(fake.flushes, 2, "one by force unit access");
    }

    #[test]
    fn a_client_that_speaks_something_else_is_left() {
        let say = |words: &[u8]| {
            let (mut stream, server) = connect();
            greet(&mut stream);
            stream.write_all(words).unwrap();
            let (ended, _) = server.join().unwrap();
            ended.unwrap_err().kind()
        };
        assert_eq!(say(b"GET / HTTP/1.1\r\n"), io::ErrorKind::InvalidData);
        let mut long = OPTION_MAGIC.to_be_bytes().to_vec();
        long.extend([0, 0, 0, 3, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(say(&long), io::ErrorKind::InvalidData);
    }
}
