//! A real server on a real socket, over the toy model, and a client that reads bytes.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

#[path = "../../../core/tests/toy/mod.rs"]
pub mod toy;

#[path = "../../../text/tests/bytes_tokenizer/mod.rs"]
pub mod bytes_tokenizer;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine_core::{Batch, DraftBatch, ExecuteError, Executor, Limits, Logits, StagedWeights};
use engine_server::{
    LoadFailure, Loaded, LoadedWeights, Loader, Roofline, ServeError, ServerOptions, WeightsLoader,
    WeightsOrigin, WeightsSource, serve,
};
use engine_spec::StartupPhase;
use engine_text::{Text, ToolCallParser};
use serde_json::Value;
use tokio::sync::oneshot;

pub const MODEL: &str = "toy";
/// Longest a test waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

pub fn limits() -> Limits {
    Limits {
        vocabulary: bytes_tokenizer::VOCABULARY,
        max_model_len: 256,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_queued_requests: 2,
        block_size: 16,
        block_count: 64,
        draft_tokens: 0,
    }
}

pub fn options() -> ServerOptions {
    let mut options = ServerOptions::new(MODEL);
    options.failure_linger = Duration::from_millis(300);
    options.drain_timeout = Duration::from_secs(10);
    options
}

/// Looks at each step and at its logits.
pub type Act = Box<dyn FnMut(usize, &mut Logits) -> Result<(), ExecuteError> + Send>;

/// The toy, with a fault, a pace or a script.
pub struct Backend {
    pub limits: Limits,
    pub toy: toy::Toy,
    pub steps: Arc<AtomicUsize>,
    /// What every chat is answered, token by token; then the end.
    pub script: Option<Vec<u32>>,
    pub act: Act,
    /// Weights that it still takes.
    pub exchanges: usize,
}

impl Backend {
    pub fn new(
        act: impl FnMut(usize, &mut Logits) -> Result<(), ExecuteError> + Send + 'static,
    ) -> Self {
        Self::sized(limits(), act)
    }

    fn sized(
        limits: Limits,
        act: impl FnMut(usize, &mut Logits) -> Result<(), ExecuteError> + Send + 'static,
    ) -> Self {
        Self {
            limits,
            toy: toy::Toy::new(limits.vocabulary, limits.block_size, limits.block_count).bounded(
                limits.max_num_batched_tokens,
                limits.max_num_seqs,
                limits.draft_tokens,
            ),
            steps: Arc::default(),
            script: None,
            act: Box::new(act),
            exchanges: usize::MAX,
        }
    }

    pub fn quick() -> Self {
        Self::new(|_, _| Ok(()))
    }

    /// Answers every chat with these words, after its reasoning `hm`.
    pub fn scripted(words: &str) -> Self {
        let text = Text::new(bytes_tokenizer::files()).unwrap();
        let mut script = text.encode("hm", false).unwrap();
        script.push(bytes_tokenizer::id("</think>"));
        script.extend(text.encode(words, false).unwrap());
        // Descriptions of tools are long where every byte is a token.
        let limits = Limits {
            max_model_len: 1024,
            block_count: 256,
            ..limits()
        };
        Self {
            script: Some(script),
            ..Self::sized(limits, |_, _| Ok(()))
        }
    }

    /// With a prediction layer that is right about two tokens in three.
    pub fn drafting(draft_tokens: usize) -> Self {
        let limits = Limits {
            draft_tokens,
            ..limits()
        };
        Self::sized(limits, |_, _| Ok(()))
    }

    pub fn slow(pause: Duration) -> Self {
        Self::new(move |step, _| {
            // The canary is quick, requests are slow.
            if step > 9 {
                std::thread::sleep(pause);
            }
            Ok(())
        })
    }
}

impl Executor for Backend {
    fn vocabulary(&self) -> usize {
        self.toy.vocabulary()
    }

    fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
        self.toy.execute(batch, logits)?;
        if let Some(script) = &self.script {
            let wanted = batch.entries.iter().filter(|entry| entry.wants_logits);
            for (row, entry) in wanted.enumerate() {
                let history = self.toy.history(entry, entry.end()).unwrap();
                let speaker = bytes_tokenizer::id("<｜Assistant｜>");
                let asked = history.iter().rposition(|token| token.0 == speaker);
                // A chat's prompt ends with `<｜Assistant｜><think>\n`; a completion at a high
                // temperature may sample the first of them.
                if let Some(said) = asked.and_then(|at| history[at..].len().checked_sub(3)) {
                    let end = bytes_tokenizer::id("<｜end▁of▁sentence｜>");
                    let next = script.get(said).copied().unwrap_or(end);
                    logits.row_mut(row)[next as usize] += 1000.0;
                }
            }
        }
        let step = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        (self.act)(step, logits)
    }

    fn draft(&mut self, pass: &DraftBatch, logits: &mut Logits) -> Result<(), ExecuteError> {
        self.toy.draft(pass, logits)
    }

    fn exchange_weights(&mut self, staged: StagedWeights) -> Result<StagedWeights, StagedWeights> {
        match self.exchanges {
            0 => Err(staged),
            _ => {
                self.exchanges -= 1;
                self.toy.exchange_weights(staged)
            }
        }
    }
}

pub fn loader(backend: Backend) -> Loader {
    calling_loader(backend, ToolCallParser::Auto)
}

/// For a model that calls tools in this format.
pub fn calling_loader(backend: Backend, parser: ToolCallParser) -> Loader {
    Box::new(move |startup| {
        startup.enter(StartupPhase::Loading, || (1000, 1000));
        let limits = backend.limits;
        let mut text = Text::new(bytes_tokenizer::files()).unwrap();
        text.set_tool_call_parser(parser);
        Ok(Loaded {
            executor: Box::new(backend),
            text,
            limits,
            weights: origin(|_| Ok(())),
            roofline: Some(Roofline {
                token_bytes: 1e3,
                all_bytes: 1e3,
                chosen: 1.0,
                bytes_per_second: 1e9,
            }),
        })
    })
}

/// Weights named `toy:NUMBER`; `act` may wait or fail before they are loaded.
pub fn origin(
    act: impl Fn(&WeightsSource) -> Result<(), LoadFailure> + Send + Sync + 'static,
) -> WeightsOrigin {
    let loader: WeightsLoader = Arc::new(move |source, update| {
        update.enter("loading", || (1, 2));
        act(source)?;
        let number = source.source.strip_prefix("toy:");
        let number: u64 = number.and_then(|n| n.parse().ok()).ok_or(LoadFailure {
            reason: "ModelNotFound".to_owned(),
            message: format!("{} is no toy", source.source),
        })?;
        Ok(LoadedWeights {
            weights: StagedWeights(Box::new(number)),
            digest: format!("sha256:{number:064x}"),
        })
    });
    WeightsOrigin {
        source: WeightsSource {
            source: "toy:0".to_owned(),
            ..WeightsSource::default()
        },
        loader: Ok(loader),
    }
}

pub fn failing_loader(reason: &str, message: &str) -> Loader {
    let failure = LoadFailure {
        reason: reason.to_owned(),
        message: message.to_owned(),
    };
    Box::new(move |_| Err(failure))
}

pub struct Server {
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Server {
    /// A server that is still loading.
    pub fn begin(options: ServerOptions, loader: Loader) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, address) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            let result = runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                ready.send(listener.local_addr().unwrap()).unwrap();
                serve(listener, options, loader, async move {
                    let _ = stopped.await;
                })
                .await
            });
            runtime.shutdown_background();
            result
        });
        Self {
            address: address.recv().unwrap(),
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// A server that is ready.
    pub fn start(options: ServerOptions, backend: Backend) -> Self {
        Self::start_with(options, loader(backend))
    }

    pub fn start_with(options: ServerOptions, loader: Loader) -> Self {
        let server = Self::begin(options, loader);
        eventually("ready", || server.get("/readyz").status == 200);
        server
    }

    /// What SIGTERM does.
    pub fn shut_down(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    /// Waits until the server has ended by itself or after [`Self::shut_down`].
    pub fn join(mut self) -> Result<(), ServeError> {
        // Keep the sender: dropping it would look like a signal.
        let _stop = self.stop.take();
        let thread = self.thread.take().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !thread.is_finished() {
            assert!(Instant::now() < deadline, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        thread.join().unwrap()
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[], body.to_string().as_bytes())
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        Exchange::open(self.address, method, path, headers, body).rest()
    }

    pub fn open(&self, path: &str, body: &Value) -> Exchange {
        Exchange::open(self.address, "POST", path, &[], body.to_string().as_bytes())
    }

    pub fn load(&self) -> Value {
        self.get("/load").json()
    }
}

/// A request that was sent and an answer that is being read.
pub struct Exchange {
    reader: BufReader<TcpStream>,
    pub status: u16,
    pub headers: Vec<(String, String)>,
}

impl Exchange {
    fn open(
        address: SocketAddr,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n",
            body.len()
        );
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
        // A server that refuses the size may close before it has read everything.
        let _ = stream.write_all(body);
        Self::read_head(stream)
    }

    pub fn read_head(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line
            .split(' ')
            .nth(1)
            .unwrap_or_else(|| panic!("no status in {line:?}"))
            .parse()
            .unwrap();
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            match line.trim_end().split_once(": ") {
                Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.to_owned())),
                None => break,
            }
        }
        Self {
            reader,
            status,
            headers,
        }
    }

    /// The next piece of a chunked body.
    pub fn chunk(&mut self) -> Option<String> {
        let mut size = String::new();
        self.reader.read_line(&mut size).ok()?;
        let size = usize::from_str_radix(size.trim(), 16).ok()?;
        let mut bytes = vec![0; size + 2];
        self.reader.read_exact(&mut bytes).ok()?;
        bytes.truncate(size);
        (size > 0).then(|| String::from_utf8(bytes).unwrap())
    }

    pub fn rest(mut self) -> Answer {
        let chunked = self
            .headers
            .iter()
            .any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let mut body = String::new();
        if chunked {
            while let Some(chunk) = self.chunk() {
                body.push_str(&chunk);
            }
        } else {
            let mut bytes = Vec::new();
            let _ = self.reader.read_to_end(&mut bytes);
            body = String::from_utf8(bytes).unwrap();
        }
        Answer {
            status: self.status,
            headers: self.headers,
            body,
        }
    }
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    /// The server-sent events, `[DONE]` left out but required.
    pub fn events(&self) -> Vec<Value> {
        let mut events: Vec<&str> = self
            .body
            .split("\n\n")
            .filter(|event| !event.is_empty())
            .collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{}", self.body);
        events
            .iter()
            .filter(|event| !event.starts_with(':'))
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }
}

pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
