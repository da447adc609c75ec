//! The wire between a component and the server: it delays, loses, refuses and repeats, and it checks what the server
//! says: an acknowledged write is durable, a list is of the present, a watch has no gaps.

use crate::world::{Canary, Rates, World};
use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{Method, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use knarr_apiserver::api::Peer;
use knarr_apiserver::identity::User;
use knarr_apiserver::respond::{Answer, Body};
use parking_lot::Mutex;
use rand::Rng;
use serde_json::Value;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

tokio::task_local! {
    static ACTOR: Actor;
}

/// Who makes a write, by which request.
#[derive(Clone, Debug, Default)]
pub struct Actor {
    pub name: String,
    pub request: String,
}

/// The one whose request is being handled.
pub fn actor() -> Actor {
    ACTOR
        .try_with(Clone::clone)
        .unwrap_or_else(|_| Actor { name: "server".to_owned(), request: String::new() })
}

/// One life of a component.
pub struct Life {
    /// Name and number.
    pub name: String,
    user: User,
    /// Cancelled when it dies.
    pub dead: CancellationToken,
    death: Mutex<Option<Death>>,
    faults: bool,
}

struct Death {
    writes_left: u32,
    after_handling: bool,
}

impl Life {
    pub fn new(name: &str, number: u32, user: User) -> Arc<Life> {
        Self::with(format!("{name}-{number}"), user, true)
    }

    /// One whose requests meet no faults but the server's death.
    pub fn calm(name: &str, user: User) -> Arc<Life> {
        Self::with(name.to_owned(), user, false)
    }

    fn with(name: String, user: User, faults: bool) -> Arc<Life> {
        Arc::new(Life { name, user, dead: CancellationToken::new(), death: Mutex::new(None), faults })
    }

    pub fn die_at_write(&self, writes_left: u32, after_handling: bool) {
        *self.death.lock() = Some(Death { writes_left, after_handling });
    }

    pub fn live_on(&self) {
        *self.death.lock() = None;
    }

    /// Counts a write; whether the component dies at this one, and when.
    fn count_write(&self) -> Option<bool> {
        let mut death = self.death.lock();
        let due = death.as_mut()?;
        if due.writes_left > 0 {
            due.writes_left -= 1;
            return None;
        }
        Some(death.take()?.after_handling)
    }
}

/// The answer did not come; the request may have been carried out.
#[derive(Debug)]
pub struct Broken(&'static str);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Broken {}

/// A tower service: what `kube::Client` stands on.
#[derive(Clone)]
pub struct Wire {
    world: Arc<World>,
    life: Arc<Life>,
}

/// What the dice say about a request.
struct Fate {
    before: Duration,
    after: Duration,
    lost: bool,
    refused: Option<u16>,
    answer_lost: bool,
    dies: Option<bool>,
}

impl Wire {
    pub fn new(world: Arc<World>, life: Arc<Life>) -> Self {
        Wire { world, life }
    }

    async fn request(self, request: Request<Body>) -> Result<Answer, Broken> {
        let line = format!("{} {}", request.method(), request.uri());
        let is_write = request.method() != Method::GET;
        let fate = self.fate(is_write);
        let call = self.clone().carry(request, line, fate, is_write);
        // A dead component hears nothing any more.
        match self.life.dead.run_until_cancelled(call).await {
            Some(answer) => answer,
            None => std::future::pending().await,
        }
    }

    async fn carry(
        self,
        request: Request<Body>,
        line: String,
        fate: Fate,
        is_write: bool,
    ) -> Result<Answer, Broken> {
        tokio::time::sleep(fate.before).await;
        if fate.dies == Some(false) {
            self.die(&line, "before");
            return std::future::pending().await;
        }
        if fate.lost {
            self.say(&line, "lost on the way");
            return Err(Broken("connection refused"));
        }
        let Some(running) = self.world.server() else {
            return Err(Broken("connection refused"));
        };
        if let Some(code) = fate.refused {
            self.say(&line, &format!("refused with {code}"));
            return Ok(refusal(code));
        }
        let asked_at = self.world.history.lock().revision();
        let is_watch = line.contains("watch=true") || line.contains("watch=1");
        let peer = Peer::InProcess(self.life.user.clone());
        let actor = Actor { name: self.life.name.clone(), request: line.clone() };
        let handling = ACTOR.scope(actor, running.server.handle(request, &peer));
        let answer =
            running.dead.run_until_cancelled(handling).await.filter(|_| !running.dead.is_cancelled());
        let Some(answer) = answer else {
            self.ambiguous(&line, is_write);
            self.say(&line, "the server died");
            return Err(Broken("connection reset"));
        };
        if is_watch {
            return Ok(self.watch(&line, answer, &running.dead));
        }
        let answer = self.check(&line, is_write, asked_at, answer).await;
        if fate.dies == Some(true) {
            self.ambiguous(&line, is_write);
            self.die(&line, "after");
            return std::future::pending().await;
        }
        if fate.answer_lost {
            self.ambiguous(&line, is_write);
            self.say(&line, "answer lost");
            return Err(Broken("connection reset"));
        }
        tokio::time::sleep(fate.after).await;
        Ok(answer)
    }

    fn fate(&self, is_write: bool) -> Fate {
        let rates = if self.life.faults { self.world.rates() } else { Rates::default() };
        let dies = if is_write { self.life.count_write() } else { None };
        let mut dice = self.world.dice.lock();
        let mut delay = || {
            let most_micros = match dice.random::<f64>() {
                luck if luck < rates.very_slow => 10_000_000,
                luck if luck < rates.very_slow + rates.slow => 500_000,
                _ => 1_000,
            };
            Duration::from_micros(dice.random_range(50..most_micros))
        };
        let (before, after) = (delay(), delay());
        let codes = [429, 500, 503, 504];
        let refused =
            dice.random_bool(rates.request_refused).then(|| codes[dice.random_range(0..codes.len())]);
        Fate {
            before,
            after,
            lost: dice.random_bool(rates.request_lost),
            refused,
            answer_lost: dice.random_bool(rates.answer_lost),
            dies,
        }
    }

    fn say(&self, line: &str, what: &str) {
        self.world.trace.line(&self.life.name, &format!("{line}: {what}"));
    }

    fn die(&self, line: &str, when: &str) {
        self.say(line, &format!("killed {when} this write"));
        self.life.dead.cancel();
    }

    /// The component does not know whether its write happened.
    fn ambiguous(&self, line: &str, is_write: bool) {
        if is_write {
            self.world.history.lock().ambiguous(line);
        }
    }

    /// Checks an answer against the history, and passes it on.
    async fn check(&self, line: &str, is_write: bool, asked_at: u64, answer: Answer) -> Answer {
        let (parts, body) = answer.into_parts();
        let bytes = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let code = parts.status.as_u16();
        let version = value["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        if is_write {
            let why = if code < 300 { "" } else { value["message"].as_str().unwrap_or_default() };
            self.say(line, &format!("{code} {version}{why}"));
        }
        let found = {
            let history = self.world.history.lock();
            match (is_write, parts.status.is_success()) {
                (_, false) => None,
                (true, true) => history.check_acknowledged(line, &value),
                (false, true) => history.check_read(line, asked_at, &value),
            }
        };
        if let Some(violation) = found {
            self.world.trace.violation(format!("{}: {line}: {violation}", self.life.name));
        }
        Response::from_parts(parts, full(bytes))
    }

    fn watch(&self, line: &str, answer: Answer, server_dead: &CancellationToken) -> Answer {
        let (parts, body) = answer.into_parts();
        if !parts.status.is_success() {
            return Response::from_parts(parts, body);
        }
        let check = self.world.history.lock().watch(line);
        let state = Watching {
            wire: self.clone(),
            line: line.to_owned(),
            body,
            check,
            server_dead: server_dead.clone(),
            over: false,
        };
        let frames = stream::unfold(state, |mut state| async move {
            let item = state.next().await?;
            Some((item.map(Frame::data), state))
        });
        Response::from_parts(parts, StreamBody::new(frames.boxed()).boxed_unsync())
    }
}

/// A watch on its way to the component.
struct Watching {
    wire: Wire,
    line: String,
    body: Body,
    check: crate::history::WatchCheck,
    server_dead: CancellationToken,
    over: bool,
}

impl Watching {
    /// The next chunk, late or twice or not at all.
    async fn next(&mut self) -> Option<Result<Bytes, std::io::Error>> {
        let dead = self.wire.life.dead.clone();
        match dead.run_until_cancelled(self.deliver()).await {
            Some(item) => item,
            None => std::future::pending().await,
        }
    }

    async fn deliver(&mut self) -> Option<Result<Bytes, std::io::Error>> {
        if self.over {
            return None;
        }
        let server_dead = self.server_dead.clone();
        let frame = match server_dead.run_until_cancelled(self.body.frame()).await {
            Some(frame) => frame?,
            None => return self.cut("the server died"),
        };
        let Ok(chunk) = frame.map(|frame| frame.into_data().unwrap_or_default()) else {
            return self.cut("failed");
        };
        let chunk = self.look_at(chunk);
        let (cut, late) = {
            let rates = self.wire.world.rates();
            let mut dice = self.wire.world.dice.lock();
            let late = dice.random_bool(rates.event_late).then(|| dice.random_range(10..20_000));
            (dice.random_bool(rates.watch_cut), late)
        };
        if let Some(millis) = late {
            tokio::time::sleep(Duration::from_millis(millis)).await;
        }
        if cut {
            return self.cut("watch cut");
        }
        Some(Ok(chunk))
    }

    fn cut(&mut self, why: &str) -> Option<Result<Bytes, std::io::Error>> {
        self.over = true;
        self.wire.say(&self.line, why);
        // Sometimes the stream just ends, sometimes it breaks.
        let breaks = self.wire.world.dice.lock().random_bool(0.5);
        breaks.then(|| Err(std::io::Error::other("connection reset")))
    }

    /// Checks every event, repeats some.
    fn look_at(&mut self, chunk: Bytes) -> Bytes {
        let mut out = Vec::with_capacity(chunk.len());
        for line in chunk.split_inclusive(|byte| *byte == b'\n') {
            if self.is_dropped_by_canary() {
                continue;
            }
            let found = self.wire.world.history.lock().check_event(&mut self.check, line);
            if let Some(violation) = found {
                let (who, request) = (&self.wire.life.name, &self.line);
                self.wire.world.trace.violation(format!("{who}: {request}: {violation}"));
            }
            let twice = self.wire.world.dice.lock().random_bool(self.wire.world.rates().event_twice);
            out.extend_from_slice(line);
            if twice && line.ends_with(b"\n") {
                out.extend_from_slice(line);
            }
        }
        out.into()
    }
}

impl Watching {
    /// The planted bug: the server forgets an event. It lies before the check, as a bug of the server would.
    fn is_dropped_by_canary(&self) -> bool {
        let world = &self.wire.world;
        world.canary == Some(Canary::DroppedEvent) && world.dice.lock().random_bool(0.01)
    }
}

impl<B> tower::Service<Request<B>> for Wire
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = Broken;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Broken>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let request = request.map(|body| body.map_err(std::io::Error::other).boxed_unsync());
        Box::pin(self.clone().request(request))
    }
}

fn full(bytes: Bytes) -> Body {
    knarr_apiserver::respond::full(bytes)
}

/// What a proxy or an overloaded server answers.
fn refusal(code: u16) -> Answer {
    let reason = match code {
        429 => "TooManyRequests",
        500 => "InternalError",
        503 => "ServiceUnavailable",
        _ => "Timeout",
    };
    let status = serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": "simulated refusal",
    });
    let mut answer = Response::new(full(Bytes::from(status.to_string())));
    *answer.status_mut() =
        http::StatusCode::from_u16(code).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    answer.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    answer
}
