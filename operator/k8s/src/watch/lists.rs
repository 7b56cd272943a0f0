//! How the list that a watch begins with is read: as a stream of events or in pages.
//!
//! A streamed list (`sendInitialEvents`) comes out of the API server's cache, object by object on the connection that goes on as
//! the watch. Pages are read one after the other: of ten thousand pods 500 took a busy API server a second.
//! Invariant: whoever cannot stream is asked for pages. API servers without the feature refuse; what stands between may end the
//! stream early, which kube begins anew without a pause.

use kube::runtime::watcher::{Config, Error, Event, Result};

/// Objects asked for at once while a list is read in pages: a page is held as text and as whole objects before it is made
/// small.
const PAGE: u32 = 200;

/// How lists are read.
#[derive(Debug)]
pub(super) struct Lists {
    streamed: bool,
    /// Whether one is being read.
    begun: bool,
}

impl Lists {
    /// As streams, as long as that goes well.
    pub(super) fn streamed() -> Self {
        Self {
            streamed: true,
            begun: false,
        }
    }

    /// The configuration of a watch.
    pub(super) fn configure(&self, config: Config) -> Config {
        match self.streamed {
            true => config.streaming_lists(),
            false => config.page_size(PAGE),
        }
    }

    /// Why a new watch has to begin that reads pages, if after `event` one has to.
    pub(super) fn turn_to_pages<K>(&mut self, event: &Result<Event<K>>) -> Option<String> {
        if !self.streamed {
            return None;
        }
        let why = match event {
            Ok(Event::Init) if self.begun => "a streamed list ended before it was complete".into(),
            Err(Error::WatchStartFailed(kube::Error::Api(status)))
                if matches!(status.code, 400 | 422) =>
            {
                status.message.clone()
            }
            Ok(Event::Init) => {
                self.begun = true;
                return None;
            }
            Ok(Event::InitDone) => {
                self.begun = false;
                return None;
            }
            _ => return None,
        };
        self.streamed = false;
        Some(why)
    }
}
