//! A disk for programs that speak NBD: `qemu`, `nbd-client`, `nbdcopy`, the kernel.
//!
//! Source: the NBD protocol (`doc/proto.md` of NetworkBlockDevice/nbd), fixed newstyle negotiation
//! and simple replies. One export, whatever name a client asks for. All numbers are big endian.
//!
//! Requests of a client are under way together, and each is answered when it has ended, whatever
//! was asked before it. A flush is for what was answered before it was asked for, as the protocol
//! has it.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::os::unix::net::UnixStream;

use block_api::{Disk, Operation};
use nix::errno::Errno;
use smol::Async;
use smol::io::{AsyncReadExt, AsyncWriteExt};

use crate::{BlockError, Ended, Pipeline, Work};

/// What is exported: a [`Pipeline`], or whatever a test has instead.
pub trait Export {
    /// What the disk is.
    fn info(&self) -> &Disk;
    /// As [`Pipeline::begin`].
    fn begin(&mut self, tag: u64, work: Work) -> Result<(), BlockError>;
    /// As [`Pipeline::ended`].
    fn ended(&mut self) -> impl Future<Output = Result<Ended, BlockError>>;
}

impl Export for Pipeline {
    fn info(&self) -> &Disk {
        Pipeline::info(self)
    }

    fn begin(&mut self, tag: u64, work: Work) -> Result<(), BlockError> {
        Pipeline::begin(self, tag, work)
    }

    async fn ended(&mut self) -> Result<Ended, BlockError> {
        Pipeline::ended(self).await
    }
}

/// Requests of a client that are under way at a time, and bytes of them: with more, its next one is
/// not read yet.
const MOST_UNDER_WAY: usize = 256;
const MOST_BYTES_UNDER_WAY: u64 = 64 << 20;

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

// Errors have Linux's numbers in the protocol.
const EINVAL: u32 = Errno::EINVAL as u32;
const EOVERFLOW: u32 = Errno::EOVERFLOW as u32;

/// Serves one client until it leaves. Blocks.
///
/// What the disk refuses the client is told, and the conversation goes on.
///
/// Errors: what the stream says; `InvalidData` for a client that does not speak the protocol.
pub fn serve(stream: UnixStream, export: &mut impl Export) -> io::Result<()> {
    smol::block_on(async {
        let mut client = Client { stream: Async::new(stream)?, export };
        if client.negotiate().await? { client.transmit().await } else { Ok(()) }
    })
}

struct Client<'a, E> {
    stream: Async<UnixStream>,
    export: &'a mut E,
}

impl<E: Export> Client<'_, E> {
    /// Whether the client wants to go on to requests.
    async fn negotiate(&mut self) -> io::Result<bool> {
        let mut greeting = b"NBDMAGICIHAVEOPT".to_vec();
        greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        self.stream.write_all(&greeting).await?;
        let flags = u32::from_be_bytes(self.take().await?);
        if flags & u32::from(FIXED_NEWSTYLE) == 0 {
            return Err(broken(format!("a client with flags {flags:#x}")));
        }
        let no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        loop {
            let magic = u64::from_be_bytes(self.take().await?);
            let option = u32::from_be_bytes(self.take().await?);
            let len = u32::from_be_bytes(self.take().await?);
            if magic != OPTION_MAGIC || len > MOST_OPTION {
                return Err(broken(format!("option {option} with magic {magic:#x}, {len} bytes")));
            }
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data).await?;
            match option {
                OPTION_EXPORT_NAME => {
                    let mut answer = self.size_and_flags();
                    if !no_zeroes {
                        answer.extend([0; 124]);
                    }
                    self.stream.write_all(&answer).await?;
                    return Ok(true);
                }
                OPTION_INFO | OPTION_GO => match wanted_information(&data) {
                    Some(wanted) => {
                        self.inform(option, &wanted).await?;
                        if option == OPTION_GO {
                            return Ok(true);
                        }
                    }
                    None => self.answer(option, INVALID, b"not well formed").await?,
                },
                OPTION_LIST => {
                    let name = format!("disk{}", self.export.info().number);
                    let mut entry = (name.len() as u32).to_be_bytes().to_vec();
                    entry.extend(name.as_bytes());
                    self.answer(option, SERVER, &entry).await?;
                    self.answer(option, ACKNOWLEDGED, &[]).await?;
                }
                OPTION_ABORT => {
                    // The client may be gone already.
                    let _ = self.answer(option, ACKNOWLEDGED, &[]).await;
                    return Ok(false);
                }
                _ => self.answer(option, UNSUPPORTED, &[]).await?,
            }
        }
    }

    /// Size and flags always, the sizes of blocks to who asks for them.
    async fn inform(&mut self, option: u32, wanted: &[u16]) -> io::Result<()> {
        const EXPORT: u16 = 0;
        const BLOCK_SIZE: u16 = 3;
        let mut export = EXPORT.to_be_bytes().to_vec();
        export.extend(self.size_and_flags());
        self.answer(option, INFORMATION, &export).await?;
        if wanted.contains(&BLOCK_SIZE) {
            let block = self.export.info().block;
            let mut sizes = BLOCK_SIZE.to_be_bytes().to_vec();
            for size in [block, block.max(4096), MOST_BYTES] {
                sizes.extend(size.to_be_bytes());
            }
            self.answer(option, INFORMATION, &sizes).await?;
        }
        self.answer(option, ACKNOWLEDGED, &[]).await
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

    async fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut reply = REPLY_MAGIC.to_be_bytes().to_vec();
        reply.extend(option.to_be_bytes());
        reply.extend(kind.to_be_bytes());
        reply.extend((data.len() as u32).to_be_bytes());
        reply.extend(data);
        self.stream.write_all(&reply).await
    }

    /// Reads requests and answers them, until the client leaves and everything has ended.
    async fn transmit(&mut self) -> io::Result<()> {
        let mut input = Input::default();
        let mut asked = Asked::default();
        let mut is_leaving = false;
        loop {
            let is_full =
                asked.by_tag.len() >= MOST_UNDER_WAY || asked.bytes >= MOST_BYTES_UNDER_WAY;
            let event = match (is_leaving || is_full, asked.by_tag.is_empty()) {
                (true, true) => return Ok(()),
                (true, false) => Event::Ended(self.export.ended().await),
                (false, true) => Event::Request(input.request(&mut self.stream).await?),
                (false, false) => {
                    // Neither takes anything before it is ready, so one of them can be dropped.
                    let ended = async { Ok(Event::Ended(self.export.ended().await)) };
                    let request =
                        async { input.request(&mut self.stream).await.map(Event::Request) };
                    smol::future::or(ended, request).await?
                }
            };
            match event {
                Event::Request(None) => is_leaving = true,
                Event::Request(Some(request)) if request.command == COMMAND_DISCONNECT => {
                    is_leaving = true;
                }
                Event::Request(Some(request)) => self.begin(request, &mut asked).await?,
                Event::Ended(ended) => match self.end(ended, &mut asked).await {
                    // A client that has left hears no more.
                    Err(_) if is_leaving => {}
                    done => done?,
                },
            }
        }
    }

    /// Begins what a request asks for, or says why not.
    async fn begin(&mut self, request: Request, asked: &mut Asked) -> io::Result<()> {
        let Request { flags, command, cookie, offset, length, data } = request;
        let is_through = flags & THROUGH != 0;
        let operation = match command {
            COMMAND_READ if length > MOST_BYTES => return self.reply(cookie, EOVERFLOW, &[]).await,
            COMMAND_READ | COMMAND_WRITE if length == 0 => return self.reply(cookie, 0, &[]).await,
            COMMAND_READ => Operation::Read,
            COMMAND_WRITE if is_through => Operation::WriteThrough,
            COMMAND_WRITE => Operation::Write,
            COMMAND_FLUSH => Operation::Flush,
            COMMAND_TRIM => Operation::Discard,
            COMMAND_WRITE_ZEROES => Operation::WriteZeroes,
            _ => return self.reply(cookie, EINVAL, &[]).await,
        };
        let has_own_way = matches!(operation, Operation::Read | Operation::WriteThrough);
        let bytes = if operation.has_data() { u64::from(length) } else { 0 };
        let is_flush_due = is_through && !has_own_way && operation != Operation::Flush;
        let work = Work { operation, offset, length: length.into(), data };
        let tag = asked.next_tag;
        asked.next_tag += 1;
        match self.export.begin(tag, work) {
            Ok(()) => {
                asked.bytes += bytes;
                asked.by_tag.insert(tag, Reply { cookie, bytes, is_flush_due });
                Ok(())
            }
            Err(err) => self.reply(cookie, err.errno() as u32, &[]).await,
        }
    }

    /// Answers a request that has ended; all of them, when the export has.
    async fn end(&mut self, ended: Result<Ended, BlockError>, asked: &mut Asked) -> io::Result<()> {
        let Ended { tag, data, outcome } = match ended {
            Ok(ended) => ended,
            Err(err) => {
                asked.bytes = 0;
                for (_, Reply { cookie, .. }) in std::mem::take(&mut asked.by_tag) {
                    self.reply(cookie, err.errno() as u32, &[]).await?;
                }
                return Ok(());
            }
        };
        let Some(Reply { cookie, bytes, is_flush_due }) = asked.by_tag.remove(&tag) else {
            return Ok(());
        };
        let mut outcome = outcome.map_err(BlockError::from);
        if is_flush_due && outcome.is_ok() {
            let flush =
                Work { operation: Operation::Flush, offset: 0, length: 0, data: Vec::new() };
            outcome = self.export.begin(tag, flush);
            if outcome.is_ok() {
                asked.by_tag.insert(tag, Reply { cookie, bytes, is_flush_due: false });
                return Ok(());
            }
        }
        asked.bytes -= bytes;
        match outcome {
            Ok(()) => self.reply(cookie, 0, &data).await,
            Err(err) => self.reply(cookie, err.errno() as u32, &[]).await,
        }
    }

    async fn reply(&mut self, cookie: [u8; 8], error: u32, data: &[u8]) -> io::Result<()> {
        let mut header = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        header.extend(error.to_be_bytes());
        header.extend(cookie);
        self.stream.write_all(&header).await?;
        self.stream.write_all(data).await
    }

    async fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).await?;
        Ok(bytes)
    }
}

/// What a client waits for, by the tag of the operation.
#[derive(Default)]
struct Asked {
    by_tag: HashMap<u64, Reply>,
    /// Of the data of all of them.
    bytes: u64,
    next_tag: u64,
}

struct Reply {
    cookie: [u8; 8],
    bytes: u64,
    /// It is to be on the medium, and its operation has no way to say so.
    is_flush_due: bool,
}

enum Event {
    /// The next request; none when the client has left.
    Request(Option<Request>),
    Ended(Result<Ended, BlockError>),
}

struct Request {
    flags: u16,
    command: u16,
    cookie: [u8; 8],
    offset: u64,
    length: u32,
    data: Vec<u8>,
}

/// The beginning of a request that has not come whole.
#[derive(Default)]
struct Input {
    bytes: Vec<u8>,
    filled: usize,
}

impl Input {
    /// The next request; none when the client has left without one. A future that is dropped before
    /// it is ready loses nothing: what has come stays here.
    async fn request(&mut self, stream: &mut Async<UnixStream>) -> io::Result<Option<Request>> {
        const HEADER: usize = 28;
        loop {
            let needed = match self.bytes.first_chunk::<HEADER>() {
                Some(header) if self.filled >= HEADER => HEADER + data_length(header)?,
                _ => HEADER,
            };
            if self.filled == needed {
                let mut bytes = std::mem::take(&mut self.bytes);
                self.filled = 0;
                let data = bytes.split_off(HEADER);
                return Ok(Some(Request {
                    flags: u16::from_be_bytes(field(&bytes, 4)),
                    command: u16::from_be_bytes(field(&bytes, 6)),
                    cookie: field(&bytes, 8),
                    offset: u64::from_be_bytes(field(&bytes, 16)),
                    length: u32::from_be_bytes(field(&bytes, 24)),
                    data,
                }));
            }
            self.bytes.resize(needed, 0);
            match stream.read(&mut self.bytes[self.filled..]).await? {
                // Leaving without a word is what many do.
                0 if self.filled == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                len => self.filled += len,
            }
        }
    }
}

/// How many bytes follow the header of a request.
fn data_length(header: &[u8; 28]) -> io::Result<usize> {
    let magic = u32::from_be_bytes(field(header, 0));
    if magic != REQUEST_MAGIC {
        return Err(broken(format!("a request with magic {magic:#x}")));
    }
    let length = u32::from_be_bytes(field(header, 24));
    match u16::from_be_bytes(field(header, 6)) {
        COMMAND_WRITE if length > MOST_BYTES => {
            Err(broken(format!("{length} bytes to write at once")))
        }
        COMMAND_WRITE => Ok(length as usize),
        _ => Ok(0),
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the header has the field")
}

/// What a client asks to be told: the numbers behind the export's name, if it is well formed.
fn wanted_information(data: &[u8]) -> Option<Vec<u16>> {
    let (len, rest) = data.split_first_chunk()?;
    let (_name, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let (count, rest) = rest.split_first_chunk()?;
    let numbers = rest.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
    (rest.len() == usize::from(u16::from_be_bytes(*count)) * 2).then(|| numbers.collect())
}

fn broken(words: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io::{Read, Write};
    use std::thread;

    use block_api::{Failure, Status};

    use super::*;

    /// 64 blocks of 512 bytes, of which the last one is bad. What is asked of the block `SLOW` ends
    /// after something else has.
    struct Fake {
        disk: Disk,
        bytes: Vec<u8>,
        done: Vec<Operation>,
        slow: VecDeque<Ended>,
        quick: VecDeque<Ended>,
    }

    const SLOW: u64 = 9 * 512;

    impl Fake {
        fn new() -> Self {
            let disk =
                Disk { number: 1, block: 512, blocks: 64, can_discard: true, ..Disk::default() };
            let (slow, quick) = (VecDeque::new(), VecDeque::new());
            Self { disk, bytes: vec![0; 64 * 512], done: Vec::new(), slow, quick }
        }

        /// What was read.
        fn run(&mut self, work: &Work) -> Result<Vec<u8>, Failure> {
            let end = (work.offset + work.length) as usize;
            if end > 63 * 512 {
                return Err(Failure::new(Status::Medium, ""));
            }
            let bytes = &mut self.bytes[work.offset as usize..end];
            match work.operation {
                Operation::Read => return Ok(bytes.to_vec()),
                Operation::Write | Operation::WriteThrough => bytes.copy_from_slice(&work.data),
                Operation::Discard => bytes.fill(0),
                Operation::Flush => {}
                Operation::WriteZeroes => return Err(Failure::new(Status::Unsupported, "")),
            }
            Ok(Vec::new())
        }
    }

    impl Export for Fake {
        fn info(&self) -> &Disk {
            &self.disk
        }

        fn begin(&mut self, tag: u64, work: Work) -> Result<(), BlockError> {
            if work.offset + work.length > 64 * 512 {
                return Err(Failure::new(Status::OutOfRange, "").into());
            }
            self.done.push(work.operation);
            let done = self.run(&work);
            let ended = match done {
                Ok(data) => Ended { tag, data, outcome: Ok(()) },
                Err(failure) => Ended { tag, data: Vec::new(), outcome: Err(failure) },
            };
            let is_slow = work.offset == SLOW;
            if is_slow { &mut self.slow } else { &mut self.quick }.push_back(ended);
            Ok(())
        }

        async fn ended(&mut self) -> Result<Ended, BlockError> {
            match self.quick.pop_front() {
                Some(ended) => {
                    self.quick.extend(self.slow.drain(..));
                    Ok(ended)
                }
                // Until something else was asked for.
                None => std::future::pending().await,
            }
        }
    }

    /// A client, and the server on a thread, which gives the disk back.
    fn connect() -> (UnixStream, thread::JoinHandle<(io::Result<()>, Fake)>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut fake = Fake::new();
            (serve(theirs, &mut fake), fake)
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

    /// Sends a request, and waits for nothing.
    fn send(
        stream: &mut UnixStream,
        [flags, command]: [u16; 2],
        cookie: &[u8; 8],
        (offset, length): (u64, u32),
        data: &[u8],
    ) {
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(cookie);
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        stream.write_all(&request).unwrap();
    }

    /// The error of a request, and what it read.
    fn request(
        stream: &mut UnixStream,
        [flags, command]: [u16; 2],
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> (u32, Vec<u8>) {
        send(stream, [flags, command], b"a cookie", (offset, length), data);
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
        assert_eq!(
            request(&mut stream, [0, COMMAND_WRITE_ZEROES], 0, 512, &[]).0,
            Errno::EOPNOTSUPP as u32
        );
        assert_eq!(request(&mut stream, read, 63 * 512, 512, &[]).0, Errno::EIO as u32);
        assert_eq!(request(&mut stream, read, 1 << 40, 512, &[]).0, Errno::ENOSPC as u32);
        assert_eq!(request(&mut stream, read, 0, u32::MAX, &[]).0, EOVERFLOW);
        assert_eq!(request(&mut stream, [0, 99], 0, 0, &[]).0, EINVAL);
        assert_eq!(request(&mut stream, [0, COMMAND_WRITE], 0, 512, &[1; 512]).0, 0);
        assert_eq!(request(&mut stream, [THROUGH, COMMAND_TRIM], 0, 512, &[]).0, 0);
        drop(stream);
        let (ended, fake) = server.join().unwrap();
        ended.unwrap();
        use Operation::{Discard, Flush, Read, Write, WriteThrough, WriteZeroes};
        let done =
            [WriteThrough, Read, Discard, Read, Flush, WriteZeroes, Read, Write, Discard, Flush];
        assert_eq!(fake.done, done, "force unit access is the write's own, or a flush behind it");
    }

    #[test]
    fn a_quick_request_overtakes_a_slow_one_and_both_are_answered() {
        let (mut stream, server) = connect();
        greet(&mut stream);
        option(&mut stream, OPTION_GO, b"\0\0\0\0\0\0");
        while answer(&mut stream, OPTION_GO).0 != ACKNOWLEDGED {}

        send(&mut stream, [0, COMMAND_WRITE], b"the slow", (SLOW, 512), &[5; 512]);
        send(&mut stream, [0, COMMAND_READ], b"the fast", (0, 512), &[]);
        let mut reply = || (take::<4>(&mut stream), take::<4>(&mut stream), take::<8>(&mut stream));
        let magic = SIMPLE_REPLY_MAGIC.to_be_bytes();
        assert_eq!(reply(), (magic, [0; 4], *b"the fast"));
        assert_eq!(take::<512>(&mut stream), [0; 512], "its data comes with it");
        let mut reply = || (take::<4>(&mut stream), take::<4>(&mut stream), take::<8>(&mut stream));
        assert_eq!(reply(), (magic, [0; 4], *b"the slow"));

        // One that is on its way when the client leaves is ended too.
        send(&mut stream, [0, COMMAND_READ], b"the last", (512, 512), &[]);
        send(&mut stream, [0, COMMAND_DISCONNECT], b"the end.", (0, 0), &[]);
        assert_eq!((take(&mut stream), take(&mut stream)), (magic, [0; 4]));
        assert_eq!((&take::<8>(&mut stream), take::<512>(&mut stream)), (b"the last", [0; 512]));
        let (ended, fake) = server.join().unwrap();
        ended.unwrap();
        assert_eq!(fake.bytes[SLOW as usize..][..512], [5; 512]);
    }

    #[test]
    fn a_request_that_comes_in_pieces_is_one() {
        let (mut stream, server) = connect();
        greet(&mut stream);
        option(&mut stream, OPTION_GO, b"\0\0\0\0\0\0");
        while answer(&mut stream, OPTION_GO).0 != ACKNOWLEDGED {}
        let mut whole = REQUEST_MAGIC.to_be_bytes().to_vec();
        whole.extend([0, 0, 0, 1]);
        whole.extend(b"a cookie\0\0\0\0\0\0\0\0\0\0\x02\0");
        whole.extend([3; 512]);
        // One before it is under way all the time, so that the reading begins anew over and over.
        send(&mut stream, [0, COMMAND_READ], b"the slow", (SLOW, 512), &[]);
        for piece in whole.chunks(11) {
            stream.write_all(piece).unwrap();
        }
        assert_eq!(take(&mut stream), SIMPLE_REPLY_MAGIC.to_be_bytes());
        assert_eq!((take(&mut stream), &take(&mut stream)), ([0; 4], b"a cookie"));
        assert_eq!(take(&mut stream), SIMPLE_REPLY_MAGIC.to_be_bytes());
        assert_eq!((take(&mut stream), &take(&mut stream)), ([0; 4], b"the slow"));
        take::<512>(&mut stream);
        drop(stream);
        let (ended, fake) = server.join().unwrap();
        ended.unwrap();
        assert_eq!(fake.bytes[..512], [3; 512]);
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
