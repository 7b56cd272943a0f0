//! A hub and an object store on loopback, with the moods of real ones.

// Not every test binary uses all of it.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef";

/// What the server does to requests for the weight file.
#[derive(Clone, Copy, PartialEq)]
pub enum Mood {
    Good,
    /// The first so many answers break off after 100 bytes.
    Breaks(usize),
    /// The first so many answers are 503.
    Busy(usize),
    /// Ignores ranges, and breaks off once.
    NoRanges,
    /// Other bytes than announced.
    Wrong,
    /// Half of each answer, and the rest when [`Server::open`] was called.
    Waits,
    /// 403 for everything.
    Denies,
    /// 404 for everything.
    KnowsNothing,
}

pub struct Server {
    pub address: String,
    pub requests: Arc<Mutex<Vec<String>>>,
    gate: Arc<AtomicBool>,
}

struct State {
    files: HashMap<String, Vec<u8>>,
    mood: Mood,
    answered: AtomicUsize,
    requests: Arc<Mutex<Vec<String>>>,
    gate: Arc<AtomicBool>,
}

impl Server {
    /// Serves the files of every model that it is asked for.
    pub fn start(mood: Mood, files: HashMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let gate = Arc::new(AtomicBool::new(false));
        let state = Arc::new(State {
            files,
            mood,
            answered: AtomicUsize::new(0),
            requests: Arc::clone(&requests),
            gate: Arc::clone(&gate),
        });
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&state);
                std::thread::spawn(move || state.answer(stream));
            }
        });
        Self {
            address,
            requests,
            gate,
        }
    }

    /// A hub that nobody has started at `address`.
    pub fn absent(address: String) -> Self {
        Self {
            address,
            requests: Arc::default(),
            gate: Arc::default(),
        }
    }

    /// Lets the rest of the answers go.
    pub fn open(&self) {
        self.gate.store(true, Ordering::SeqCst);
    }

    pub fn count(&self, part: &str) -> usize {
        let requests = self.requests.lock().unwrap();
        requests.iter().filter(|line| line.contains(part)).count()
    }
}

impl State {
    fn answer(&self, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut head = String::new();
        while reader.read_line(&mut head).ok()? > 2 {}
        self.requests.lock().ok()?.push(head.clone());
        let path = head.split_whitespace().nth(1)?.to_owned();
        let name = path.split('?').next()?.rsplit('/').next()?.to_owned();
        match self.mood {
            Mood::Denies => return plain(&mut stream, "403 Forbidden", ""),
            Mood::KnowsNothing => return plain(&mut stream, "404 Not Found", ""),
            _ => (),
        }
        if path.starts_with("/api/models/") {
            return plain(&mut stream, "200 OK", &self.hub_listing());
        }
        if path.contains("list-type=2") {
            return plain(&mut stream, "200 OK", &self.store_listing());
        }
        let Some(mut body) = self.files.get(&name).cloned() else {
            return plain(&mut stream, "404 Not Found", "");
        };
        let range = head
            .lines()
            .find_map(|line| {
                line.to_ascii_lowercase()
                    .strip_prefix("range: bytes=")
                    .map(str::to_owned)
            })
            .and_then(|range| {
                let (start, end) = range.trim().split_once('-')?;
                Some(start.parse::<usize>().ok()?..end.parse::<usize>().ok()? + 1)
            })
            .unwrap_or(0..body.len());
        let mut sent = usize::MAX;
        if name == "model.safetensors" {
            let earlier = self.answered.fetch_add(1, Ordering::SeqCst);
            match self.mood {
                Mood::Busy(times) if earlier < times => {
                    return plain(&mut stream, "503 Service Unavailable", "");
                }
                Mood::Breaks(times) if earlier < times => sent = 100,
                Mood::NoRanges if earlier == 0 => sent = 100,
                Mood::Wrong => *body.last_mut()? ^= 1,
                _ => (),
            }
        }
        let total = body.len();
        let (status, part) = if self.mood == Mood::NoRanges {
            ("200 OK".to_owned(), &body[..])
        } else {
            let [start, end] = [range.start, range.end];
            let status = format!(
                "206 Partial Content\r\nContent-Range: bytes {start}-{}/{total}",
                end - 1
            );
            (status, &body[range])
        };
        let length = part.len();
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        )
        .ok()?;
        if self.mood == Mood::Waits && name == "model.safetensors" {
            let (first, rest) = part.split_at(length / 2);
            stream.write_all(first).ok()?;
            while !self.gate.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
            return stream.write_all(rest).ok();
        }
        stream.write_all(&part[..length.min(sent)]).ok()
    }

    fn hub_listing(&self) -> String {
        let siblings: Vec<_> = self
            .files
            .iter()
            .map(|(name, bytes)| {
                let hash: String = Sha256::digest(bytes)
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect();
                let lfs = name
                    .ends_with(".safetensors")
                    .then(|| json!({"sha256": hash}));
                json!({"rfilename": name, "size": bytes.len(), "lfs": lfs})
            })
            .collect();
        json!({"sha": COMMIT, "siblings": siblings}).to_string()
    }

    fn store_listing(&self) -> String {
        let objects: String = self
            .files
            .iter()
            .map(|(name, bytes)| {
                format!(
                    "<Contents><Key>models/tiny/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                     <ETag>\"tag\"</ETag><Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>",
                    bytes.len()
                )
            })
            .collect();
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\
             <ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>bucket</Name>\
             <Prefix>models/tiny/</Prefix><KeyCount>3</KeyCount><MaxKeys>1000</MaxKeys><Delimiter>/</Delimiter>\
             <EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>"
        )
    }
}

fn plain(stream: &mut TcpStream, status: &str, body: &str) -> Option<()> {
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .ok()
}
