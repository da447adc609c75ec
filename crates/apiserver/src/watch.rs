//! Watches: a stream of changes, off the shared history.
//!
//! Every watcher holds only a position. Selectors turn changes of membership into `ADDED` and `DELETED`;
//! bookmarks tell idle clients how far they are; a client that falls behind the history is told `410`.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use knarr_api::columns::Clock;
use knarr_api::field;
use knarr_api::rules::Rules;
use knarr_api::schema::Kind;
use knarr_api::status::{Result, Status};
use knarr_store::{Entry, Event, Range, ReadError, Revision, Watcher};
use rand::Rng;
use serde_json::{Value, json};
use tokio::time::{Instant, Sleep, sleep};

use crate::metrics::metrics;
use crate::registry::{Registry, Selection, partition, prefix};
use crate::request::Query;
use crate::respond::{Answer, Encoding, Form, Shape, answer, shaped};
use crate::{encode, wire};

/// How often an idle watcher is told where it stands.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
/// The objects there are when a watch begins are sent in chunks of about this many bytes: a reader that is slow
/// costs one chunk, not a copy of everything.
const CHUNK: usize = 256 * 1024;
/// Watches end by themselves after half an hour to an hour, so that clients spread over servers.
const TIMEOUT_SECONDS_MIN: u64 = 1800;

/// What to watch.
pub struct Request {
    pub namespace: String,
    pub selection: Selection,
    pub query: Query,
    pub form: Form,
}

/// Opens a watch; the answer streams until the timeout, an error, or the client's end.
pub fn open(registry: &Arc<Registry>, kind: &'static Kind, request: Request) -> Result<Answer> {
    let query = &request.query;
    let wants_initial = query.flag("sendInitialEvents");
    let bookmarks = query.flag("allowWatchBookmarks");
    let version = query.get("resourceVersion").unwrap_or_default();
    check_options(query)?;
    let from: Option<Revision> = match version {
        "" | "0" => None,
        text => Some(text.parse().map_err(|_| {
            Status::bad_request(format!(
                "Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
            ))
        })?),
    };
    let timeout = match query.number("timeoutSeconds")? {
        Some(seconds) if seconds > 0 => seconds as u64,
        _ => rand::rng().random_range(TIMEOUT_SECONDS_MIN..2 * TIMEOUT_SECONDS_MIN),
    };
    // Without a revision, the current objects come first, as if just added.
    let initial = wants_initial || (from.is_none() && query.get("sendInitialEvents").is_none());
    let (first, position) = if initial {
        let listing = registry
            .store
            .list(&partition(kind), &Range { prefix: prefix(&request.namespace), ..Range::default() });
        let listing = listing.map_err(|e| read_failed(&e))?;
        if from.is_some_and(|f| f > listing.revision) {
            return Err(too_new(from.unwrap_or(0), listing.revision));
        }
        (listing.entries, listing.revision)
    } else {
        (Vec::new(), from.unwrap_or_else(|| registry.store.revision()))
    };
    let watcher = match registry.store.watch(&partition(kind), position) {
        Ok(watcher) => watcher,
        Err(error) => return Ok(closed_with(&read_failed(&error), &request.form)),
    };
    let rules = Rules::of(kind);
    let first: Vec<Arc<Entry>> = first.into_iter().filter(|e| request.selection.matches(rules, e)).collect();
    let stream = Stream {
        registry: registry.clone(),
        kind,
        rules,
        prefix: prefix(&request.namespace),
        selection: request.selection,
        form: request.form.clone(),
        watcher,
        deadline: Box::pin(sleep(Duration::from_secs(timeout))),
        next_bookmark: bookmarks.then(|| Box::pin(sleep(BOOKMARK_INTERVAL))),
        state: State::Initial {
            entries: first.into_iter(),
            mark: (wants_initial && bookmarks).then_some(position),
        },
        headings: true,
    };
    let frames = stream::unfold(stream, |mut stream| async move {
        let chunk = stream.next().await?;
        Some((Ok(Frame::data(chunk)), stream))
    });
    Ok(answer(200, content_type(&request.form), StreamBody::new(frames).boxed_unsync()))
}

/// Which options of a watch go together.
fn check_options(query: &Query) -> Result<()> {
    const MATCH: &str = "resourceVersionMatch";
    let wanted = query.get(MATCH).unwrap_or_default();
    let initial = query.get("sendInitialEvents").is_some();
    let mut errors = Vec::new();
    if initial && wanted != "NotOlderThan" {
        let detail = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
        errors.push(field::Error::forbidden(MATCH, detail));
    }
    if !wanted.is_empty() {
        if !initial {
            let detail = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
            errors.push(field::Error::forbidden(MATCH, detail));
        }
        if wanted != "NotOlderThan" {
            errors.push(field::Error::not_supported(MATCH, wanted, &["NotOlderThan"]));
        }
        if query.get("continue").is_some_and(|c| !c.is_empty()) {
            let detail = "resourceVersionMatch is forbidden when continue is provided";
            errors.push(field::Error::forbidden(MATCH, detail));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(Status::invalid_options("ListOptions", &errors)) }
}

fn content_type(form: &Form) -> &'static str {
    match (form.encoding, &form.shape) {
        (Encoding::Protobuf, _) => "application/vnd.kubernetes.protobuf;stream=watch",
        (_, Shape::Whole) => "application/json",
        (_, _) => "application/json;stream=watch",
    }
}

/// A watch that could not start says so in the stream, as upstream does.
fn closed_with(status: &Status, form: &Form) -> Answer {
    let mut chunk = Vec::new();
    event(&mut chunk, "ERROR", &status.to_value(), form);
    answer(200, content_type(form), crate::respond::full(chunk))
}

/// Appends an event about any value.
fn event(out: &mut Vec<u8>, name: &str, object: &Value, form: &Form) {
    match form.encoding {
        Encoding::Protobuf => out.extend(wire::event(name, object).unwrap_or_default()),
        _ => out.extend(format!("{}\n", json!({ "type": name, "object": object })).bytes()),
    }
}

pub fn read_failed(error: &ReadError) -> Box<Status> {
    match error {
        ReadError::Compacted { requested, oldest } => {
            Status::expired(format!("too old resource version: {requested} ({oldest})"))
        }
        ReadError::Future { requested, newest } => too_new(*requested, *newest),
    }
}

fn too_new(requested: Revision, newest: Revision) -> Box<Status> {
    let mut status = Status::timeout(format!("Too large resource version: {requested}, current: {newest}"));
    status.details = Some(
        json!({ "causes": [{ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" }], "retryAfterSeconds": 1 }),
    );
    status
}

/// About the bytes an event takes in JSON.
fn room(event: &Event) -> usize {
    let (Ok(entry) | Err(entry)) = &event.after;
    entry.bytes.len() + 64
}

struct Stream {
    registry: Arc<Registry>,
    kind: &'static Kind,
    rules: &'static Rules,
    prefix: String,
    selection: Selection,
    form: Form,
    watcher: Watcher,
    /// Timers live as long as the watch: one set at each change would cost more than the change.
    deadline: Pin<Box<Sleep>>,
    next_bookmark: Option<Pin<Box<Sleep>>>,
    state: State,
    /// Only the first table of a watch has column definitions.
    headings: bool,
}

enum State {
    /// The objects there were come first; then the mark that they are complete.
    Initial {
        entries: std::vec::IntoIter<Arc<Entry>>,
        mark: Option<Revision>,
    },
    Live,
    Ended,
}

enum Wake {
    Events(std::result::Result<Vec<Event>, ReadError>),
    Bookmark,
    Timeout,
}

impl Stream {
    /// The next chunk of the body; never empty.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            match std::mem::replace(&mut self.state, State::Live) {
                State::Ended => {
                    self.state = State::Ended;
                    return None;
                }
                State::Initial { mut entries, mark } => {
                    let mut out = Vec::new();
                    while out.len() < CHUNK
                        && let Some(entry) = entries.next()
                    {
                        self.write(&mut out, "ADDED", &entry.bytes);
                    }
                    if entries.len() > 0 {
                        self.state = State::Initial { entries, mark };
                    } else if let Some(revision) = mark {
                        self.bookmark(&mut out, revision, true);
                    }
                    if !out.is_empty() {
                        return Some(out.into());
                    }
                }
                State::Live => match self.wake().await {
                    Wake::Timeout => self.state = State::Ended,
                    Wake::Bookmark => {
                        if let Some(timer) = &mut self.next_bookmark {
                            timer.as_mut().reset(Instant::now() + BOOKMARK_INTERVAL);
                        }
                        self.watcher.advance(self.registry.store.revision());
                        let mut out = Vec::new();
                        self.bookmark(&mut out, self.watcher.position(), false);
                        return Some(out.into());
                    }
                    Wake::Events(Err(error)) => {
                        self.state = State::Ended;
                        let mut out = Vec::new();
                        event(&mut out, "ERROR", &read_failed(&error).to_value(), &self.form);
                        return Some(out.into());
                    }
                    Wake::Events(Ok(events)) => {
                        let mut out = Vec::with_capacity(events.iter().map(room).sum());
                        events.iter().for_each(|event| self.event(&mut out, event));
                        metrics().watch_events.fetch_add(events.len() as u64, Relaxed);
                        if !out.is_empty() {
                            return Some(out.into());
                        }
                    }
                },
            }
        }
    }

    async fn wake(&mut self) -> Wake {
        let bookmark = async {
            match &mut self.next_bookmark {
                Some(timer) => timer.as_mut().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = &mut self.deadline => Wake::Timeout,
            () = bookmark => Wake::Bookmark,
            events = self.watcher.next() => Wake::Events(events),
        }
    }

    fn event(&mut self, out: &mut Vec<u8>, event: &Event) {
        if !event.key().starts_with(&self.prefix) {
            return;
        }
        let matches = |entry: &Arc<Entry>| self.selection.matches(self.rules, entry);
        let was = event.before.as_ref().is_some_and(matches);
        match &event.after {
            Ok(entry) => match (was, matches(entry)) {
                (false, true) => self.write(out, "ADDED", &entry.bytes),
                (true, true) => self.write(out, "MODIFIED", &entry.bytes),
                (true, false) => {
                    // It left the selection: its last selected state, at the revision of leaving.
                    if let Some(before) = &event.before {
                        let left = encode::at_revision(self.kind, &before.bytes, event.revision);
                        self.write(out, "DELETED", &left);
                    }
                }
                (false, false) => {}
            },
            Err(last) if was => {
                // History that was read back from the log has the state before, which names an older revision.
                let last = encode::at_revision(self.kind, &last.bytes, last.revision);
                self.write(out, "DELETED", &last);
            }
            Err(_) => {}
        }
    }

    fn write(&mut self, out: &mut Vec<u8>, name: &str, bytes: &Bytes) {
        if self.form.is_stored_form() {
            out.extend(br#"{"type":""#);
            out.extend(name.as_bytes());
            out.extend(br#"","object":"#);
            let (head, tail) = self.form.stored(self.kind, bytes);
            out.extend(head);
            out.extend(tail);
            out.extend(b"}\n");
            return;
        }
        let value: Value = serde_json::from_slice(bytes).expect("stored bytes are json");
        let clock = Clock { now: (self.registry.clock)() };
        let shown = shaped(self.kind, value, &self.form, clock, self.headings);
        self.headings = false;
        event(out, name, &shown, &self.form);
    }

    fn bookmark(&self, out: &mut Vec<u8>, revision: Revision, initial_end: bool) {
        let mut metadata = json!({ "resourceVersion": revision.to_string() });
        if initial_end {
            metadata["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
        }
        let object = match &self.form.shape {
            Shape::Whole => {
                let api_version = self.form.version.unwrap_or(self.kind).api_version();
                json!({ "kind": self.kind.kind, "apiVersion": api_version, "metadata": metadata })
            }
            Shape::Partial { version } => {
                json!({ "kind": "PartialObjectMetadata", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata })
            }
            Shape::Table { version, .. } => {
                json!({ "kind": "Table", "apiVersion": format!("meta.k8s.io/{version}"), "metadata": metadata, "columnDefinitions": null, "rows": [] })
            }
        };
        event(out, "BOOKMARK", &object, &self.form);
    }
}
