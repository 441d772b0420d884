//! A client that writes HTTP/2 frames by hand, to attack a server.

use std::io;

use absurd_proto::v1 as pb;
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Maximum number of rounds of a flood.
const FLOOD_MAX: u32 = 4_000_000;
/// Rounds in one write.
const FLOOD_STEP: usize = 50;

/// Kinds of floods: endless frames that request no work.
#[derive(Debug, Clone, Copy)]
pub enum Flood {
    /// Ping frames.
    Ping,
    /// Settings frames, each with four unknown settings.
    Settings,
    /// Calls that are reset at once.
    Reset,
    /// A header block that never ends.
    Continuation,
}

impl Flood {
    /// Every kind of flood.
    pub const ALL: [Self; 4] = [Self::Ping, Self::Settings, Self::Reset, Self::Continuation];
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A connection on which a test writes HTTP/2 frames by hand.
#[derive(Debug)]
pub struct Attacker {
    socket: TcpStream,
}

impl Attacker {
    /// Connects to an address such as `http://127.0.0.1:1234`, and sends the preface.
    pub async fn connect(url: &str) -> io::Result<Self> {
        let mut socket = TcpStream::connect(url.trim_start_matches("http://")).await?;
        socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        Ok(Self { socket })
    }

    async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> io::Result<()> {
        self.socket.write_all(&frame(kind, flags, stream, payload)).await
    }

    /// Sends a settings frame with these identifiers and values.
    pub async fn settings(&mut self, settings: &[(u16, u32)]) -> io::Result<()> {
        let mut payload = Vec::new();
        for (name, value) in settings {
            payload.extend(name.to_be_bytes());
            payload.extend(value.to_be_bytes());
        }
        self.frame(4, 0, 0, &payload).await
    }

    fn headers(method: &str) -> Vec<u8> {
        // POST and http are entries of the static table; the others are literals that are not indexed.
        let mut block = vec![0x83, 0x86];
        let mut literal = |name: &str, value: &str| {
            block.push(0);
            block.push(u8::try_from(name.len()).unwrap());
            block.extend(name.as_bytes());
            block.push(u8::try_from(value.len()).unwrap());
            block.extend(value.as_bytes());
        };
        literal(":path", &format!("/absurd.v1.AbsurdService/{method}"));
        literal(":authority", "x");
        literal("content-type", "application/grpc");
        literal("te", "trailers");
        block
    }

    /// Sends a `ClaimStream` call on this HTTP/2 stream.
    pub async fn claim_stream(&mut self, stream: u32, request: &pb::ClaimStreamRequest) -> io::Result<()> {
        self.frame(1, 4, stream, &Self::headers("ClaimStream")).await?;
        let message = request.encode_to_vec();
        let mut body = vec![0];
        body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        body.extend(message);
        self.frame(0, 1, stream, &body).await
    }

    /// Begins and resets `calls` calls in one write, as a client does whose calls time out together, and then makes one
    /// more. Returns whether that one is answered before the server ends the connection.
    pub async fn give_up(&mut self, calls: u32) -> io::Result<bool> {
        self.settings(&[]).await?;
        let streams = (0..calls).map(|call| call * 2 + 1);
        let headers = Self::headers("GetQueueStats");
        let mut bytes: Vec<u8> = streams
            .flat_map(|stream| [frame(1, 4, stream, &headers), frame(3, 0, stream, &8_u32.to_be_bytes())].concat())
            .collect();
        let last = calls * 2 + 1;
        bytes.extend(frame(1, 4, last, &headers));
        bytes.extend(frame(0, 1, last, &[0; 5]));
        self.socket.write_all(&bytes).await?;
        loop {
            let mut head = [0; 9];
            self.socket.read_exact(&mut head).await?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.socket.read_exact(&mut payload).await?;
            match head[3] {
                1 if head[5..] == last.to_be_bytes() => return Ok(true),
                7 => return Ok(false),
                _ => {}
            }
        }
    }

    /// Reads until the connection ends.
    pub async fn end(&mut self) {
        let mut buffer = [0; 4096];
        while matches!(self.socket.read(&mut buffer).await, Ok(1..)) {}
    }

    /// Sends frames of a kind until the server ends the connection. Returns the number of rounds before the last write;
    /// `None` if the server takes the maximum. One write holds many frames, so that a loaded machine floods too.
    pub async fn flood(&mut self, kind: Flood) -> io::Result<Option<u32>> {
        self.settings(&[]).await?;
        let mut buffer = vec![0; 64 * 1024];
        for first in (0..FLOOD_MAX).step_by(FLOOD_STEP) {
            let step = first..first + u32::try_from(FLOOD_STEP).unwrap();
            let bytes: Vec<u8> = step.flat_map(|round| Self::flooding(kind, round)).collect();
            let sent = self.socket.write_all(&bytes).await;
            if sent.is_err() || matches!(self.socket.try_read(&mut buffer), Ok(0)) {
                return Ok(Some(first));
            }
        }
        Ok(None)
    }

    /// The frames of one round of a flood.
    fn flooding(kind: Flood, round: u32) -> Vec<u8> {
        let stream = round * 2 + 1;
        match kind {
            Flood::Ping => frame(6, 0, 0, &[7; 8]),
            // Unknown settings, because empty frames are so small that a loaded machine cannot send a megabyte of them
            // per second.
            Flood::Settings => frame(4, 0, 0, &[0xf0, 0xf0, 0, 0, 0, 0].repeat(4)),
            Flood::Reset => {
                let opened = frame(1, 4, stream, &Self::headers("GetQueueStats"));
                [opened, frame(3, 0, stream, &8_u32.to_be_bytes())].concat()
            }
            Flood::Continuation if round == 0 => frame(1, 0, 1, &[0x83, 0x86]),
            Flood::Continuation => frame(9, 0, 1, &[0, 1, b'a', 1, b'b']),
        }
    }
}
