//! What engine pods say about themselves, as far as decisions and the status ask for it.

use engine_spec::{LoadReport, StartupPhase, StartupReport};
use jiff::Timestamp;

use crate::time::seconds_between;

/// Seconds after which the window of a comparison moves on.
const WINDOW_SECONDS: u64 = 300;
/// Seconds for which an answer is told of at least.
const CURRENT_SECONDS: u64 = 60;
/// The longest that one is told of: pods of the largest fleets are asked every few minutes.
const CURRENT_SECONDS_MAX: u64 = 1200;

/// One scrape of `/load`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadSample {
    /// When.
    pub at: Timestamp,
    /// What it said.
    pub report: LoadReport,
}

/// What one engine pod said about itself: the last answers whole, and of those before them the few numbers that are still
/// asked for. There are ten thousand of these.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodSamples {
    /// The last answer of `/startupz`.
    pub startup: Option<Startup>,
    /// The last answer of `/load`.
    pub latest: Option<LoadSample>,
    /// Rates between the last two answers of `/load`.
    pub rates: Rates,
    /// Seconds between these two; 0 where there is one.
    pub apart_seconds: u64,
    /// Counters of five to ten minutes ago, or of the first answer: where comparisons begin.
    pub window: Option<Counters>,
    /// Those that take their place when they are five minutes old.
    pub next_window: Option<(Timestamp, Counters)>,
}

/// How far an engine is with its start.
#[derive(Clone, Debug, PartialEq)]
pub enum Startup {
    /// It has not started; what it said.
    Starts(Box<StartupReport>),
    /// It has started, and nothing else of its report is of use.
    Ready,
}

/// Tokens per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Generated.
    pub generation_tokens: f64,
    /// Of prompts.
    pub prompt_tokens: f64,
}

/// Counters of an engine that revisions are compared by, since the engine's start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counters {
    /// Requests answered.
    pub requests: u64,
    /// Those of them answered with a status of 500 or above.
    pub request_errors: u64,
    /// Sequences that gave a first token.
    pub first_tokens: u64,
    /// Seconds from arrival to the first token, summed over them.
    pub first_token_seconds: f64,
}

impl PodSamples {
    /// Takes in the text of `/startupz`.
    ///
    /// # Errors
    /// When it is not a report.
    pub fn record_startup(&mut self, text: &str) -> Result<(), serde_json::Error> {
        let report: StartupReport = serde_json::from_str(text)?;
        self.startup = Some(Startup::from(report));
        Ok(())
    }

    /// Whether the engine said that it has started.
    pub fn has_started(&self) -> bool {
        self.startup == Some(Startup::Ready)
    }

    /// Takes in the text of `/load` as answered at `at`.
    ///
    /// # Errors
    /// When it is not a report.
    pub fn record_load(&mut self, at: Timestamp, text: &str) -> Result<(), serde_json::Error> {
        let report = serde_json::from_str(text)?;
        self.take_load(LoadSample { at, report });
        Ok(())
    }

    /// Takes in an answer of `/load`.
    pub fn take_load(&mut self, sample: LoadSample) {
        let (new, old) = (&sample.report, self.latest.as_ref().map(|old| &old.report));
        let went_back = old.is_some_and(|old| {
            new.requests_total < old.requests_total
                || new.generation_tokens_total < old.generation_tokens_total
        });
        let counters = Counters::of(&sample.report);
        if went_back || self.window.is_none() {
            // An engine that starts, or started anew, counts from here.
            self.window = Some(counters);
            self.next_window = Some((sample.at, counters));
        }
        if let Some((at, next)) = self.next_window
            && seconds_between(at, sample.at) >= WINDOW_SECONDS
        {
            self.window = Some(next);
            self.next_window = Some((sample.at, counters));
        }
        let before = self.latest.as_ref();
        self.rates = before.map_or_else(Rates::default, |before| Rates::between(before, &sample));
        self.apart_seconds = before.map_or(0, |before| seconds_between(before.at, sample.at));
        self.latest = Some(sample);
    }

    /// The last answer of `/load`, unless others should have come since.
    pub fn current(&self, now: Timestamp) -> Option<&LoadSample> {
        let most = (2 * self.apart_seconds).clamp(CURRENT_SECONDS, CURRENT_SECONDS_MAX);
        let latest = self.latest.as_ref();
        latest.filter(|sample| seconds_between(sample.at, now) <= most)
    }

    /// The counters at the beginning and at the end of the window that is compared.
    pub fn window(&self) -> Option<(Counters, Counters)> {
        Some((self.window?, Counters::of(&self.latest.as_ref()?.report)))
    }
}

impl From<StartupReport> for Startup {
    fn from(report: StartupReport) -> Self {
        match report.phase {
            StartupPhase::Ready => Startup::Ready,
            _ => Startup::Starts(Box::new(report)),
        }
    }
}

impl Rates {
    /// Over the time between two answers; a counter that went back belongs to an engine that started anew, and gives 0.
    fn between(old: &LoadSample, new: &LoadSample) -> Self {
        let millis = new.at.as_millisecond() - old.at.as_millisecond();
        let rate = |new: u64, old: u64| match new.checked_sub(old) {
            Some(tokens) if millis > 0 => tokens as f64 * 1000.0 / millis as f64,
            _ => 0.0,
        };
        let (new, old) = (&new.report, &old.report);
        Rates {
            generation_tokens: rate(new.generation_tokens_total, old.generation_tokens_total),
            prompt_tokens: rate(new.prompt_tokens_total, old.prompt_tokens_total),
        }
    }
}

impl Counters {
    fn of(report: &LoadReport) -> Self {
        Counters {
            requests: report.requests_total,
            request_errors: report.request_errors_total,
            first_tokens: report.first_tokens_total,
            first_token_seconds: report.first_token_seconds_total,
        }
    }
}

/// There are ten thousand of these: half of what four reports would take.
const _: () = assert!(size_of::<PodSamples>() <= 232);
