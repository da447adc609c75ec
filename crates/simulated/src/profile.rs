//! What nodes and pods declare about their simulation. Every property is an annotation with the prefix
//! [`PREFIX`]; what a pod says counts before what its node says, and that before the default.
//!
//! | annotation | value | default | meaning |
//! | --- | --- | --- | --- |
//! | `start-delay` | time | `0s` | from the binding until the containers run |
//! | `ready-delay` | time | `0s` | from then until they are ready |
//! | `run-time` | time or `forever` | `forever`; `1s` unless `restartPolicy` is `Always` | until the containers end |
//! | `exit-code` | 0 to 255 | `0` | with which they end |
//! | `failure-chance` | chance | `0` | that a run fails instead |
//! | `failure-exit-code` | 1 to 255 | `1` | and ends with this |
//! | `start-failure-chance` | chance | `0` | that an attempt to start fails; it is repeated with back-off |
//! | `start-failure-reason` | word | `ImagePullBackOff` | why the containers wait then |
//! | `unready-after` | time or `never` | `never` | how long ready containers stay so |
//! | `unready-for` | time | `5s` | and how long until they are ready again |
//! | `stop-delay` | time | `0s` | from the deletion until the containers end; the grace period bounds it |
//! | `capacity` (node) | `cpu=32,memory=256Gi,…` | see [`CAPACITY`] | what the node has, also extended resources |
//! | `down` (node) | `true` | | the node is dead: no heartbeat, and its pods are left alone |
//!
//! A time is written as in Go (`1m30s`, `500ms`) or as a range (`1s-3s`), from which each pod draws. A chance is a
//! number from 0 to 1 or a percentage (`5%`). What is drawn depends on the pod's uid, so it does not change when the
//! process starts anew.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

/// Of every annotation of a simulation.
pub const PREFIX: &str = "simulated.knarr.dev/";
/// What a node has if it does not say.
pub const CAPACITY: [(&str, &str); 4] =
    [("cpu", "32"), ("memory", "256Gi"), ("ephemeral-storage", "512Gi"), ("pods", "250")];
pub const CAPACITY_KEY: &str = "simulated.knarr.dev/capacity";
/// A property of the node that takes it down.
pub const DOWN: &str = "simulated.knarr.dev/down";

type Annotations = BTreeMap<String, String>;

/// The declared properties of one pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    pub start_delay: Span,
    pub ready_delay: Span,
    /// `None` is for ever.
    pub run_time: Option<Span>,
    pub exit_code: i32,
    pub failure_chance: f64,
    pub failure_exit_code: i32,
    pub start_failure_chance: f64,
    pub start_failure_reason: String,
    /// `None` is never.
    pub unready_after: Option<Span>,
    pub unready_for: Span,
    pub stop_delay: Span,
}

/// A time, or a range of times to draw from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Span {
    pub least: Duration,
    pub most: Duration,
}

/// Draws for one pod: the same for the same pod, round and property.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    pub uid: &'a str,
    /// Which run of the containers it is about.
    pub round: i64,
}

impl Profile {
    /// The properties of a pod, and what is wrong with its annotations; wrong ones count as absent.
    pub fn of(
        pod: Option<&Annotations>,
        node: Option<&Annotations>,
        restarts_always: bool,
    ) -> (Profile, Vec<String>) {
        let mut read = Reader { pod, node, wrong: Vec::new() };
        let ends = if restarts_always { None } else { Some(Span::exactly(Duration::from_secs(1))) };
        let profile = Profile {
            start_delay: read.property("start-delay", span).unwrap_or_default(),
            ready_delay: read.property("ready-delay", span).unwrap_or_default(),
            run_time: read.property("run-time", endless).unwrap_or(ends),
            exit_code: read.property("exit-code", |text| exit_code(text, 0)).unwrap_or(0),
            failure_chance: read.property("failure-chance", chance).unwrap_or(0.0),
            failure_exit_code: read.property("failure-exit-code", |text| exit_code(text, 1)).unwrap_or(1),
            start_failure_chance: read.property("start-failure-chance", chance).unwrap_or(0.0),
            start_failure_reason: read
                .property("start-failure-reason", word)
                .unwrap_or_else(|| "ImagePullBackOff".to_owned()),
            unready_after: read.property("unready-after", endless).unwrap_or(None),
            unready_for: read.property("unready-for", span).unwrap_or(Span::exactly(Duration::from_secs(5))),
            stop_delay: read.property("stop-delay", span).unwrap_or_default(),
        };
        (profile, read.wrong)
    }

    /// The exit code of a run.
    pub fn outcome(&self, draw: Draw) -> i32 {
        if draw.happens("failure", self.failure_chance) { self.failure_exit_code } else { self.exit_code }
    }
}

/// What a node has: the default, changed by its annotation. The second is what is wrong with it.
pub fn capacity(node: Option<&Annotations>) -> (BTreeMap<String, Quantity>, Option<String>) {
    let mut all: BTreeMap<String, Quantity> =
        CAPACITY.iter().map(|(name, amount)| ((*name).to_owned(), Quantity((*amount).to_owned()))).collect();
    let declared = node.and_then(|node| node.get(CAPACITY_KEY)).map(String::as_str).unwrap_or_default();
    for part in declared.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        match part.split_once('=').filter(|(name, amount)| !name.is_empty() && is_quantity(amount)) {
            Some((name, amount)) => _ = all.insert(name.to_owned(), Quantity(amount.to_owned())),
            None => {
                let wrong =
                    format!("annotation {CAPACITY_KEY}: {part:?} is not resource=quantity, such as cpu=32");
                return (all, Some(wrong));
            }
        }
    }
    (all, None)
}

/// Whether the node plays dead.
pub fn is_down(node: Option<&Annotations>) -> bool {
    node.and_then(|node| node.get(DOWN)).is_some_and(|value| value == "true")
}

impl Span {
    pub const fn exactly(time: Duration) -> Span {
        Span { least: time, most: time }
    }

    /// A time from the range.
    pub fn draw(&self, draw: Draw, property: &str) -> Duration {
        self.least + self.most.saturating_sub(self.least).mul_f64(draw.number(property))
    }
}

impl Draw<'_> {
    /// A number from 0 up to, and without, 1.
    pub fn number(&self, property: &str) -> f64 {
        let mut hasher = DefaultHasher::new();
        (self.uid, self.round, property).hash(&mut hasher);
        (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn happens(&self, property: &str, chance: f64) -> bool {
        self.number(property) < chance
    }
}

struct Reader<'a> {
    pod: Option<&'a Annotations>,
    node: Option<&'a Annotations>,
    wrong: Vec<String>,
}

impl Reader<'_> {
    fn property<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, &'static str>) -> Option<T> {
        let key = format!("{PREFIX}{name}");
        for annotations in [self.pod, self.node] {
            let Some(text) = annotations.and_then(|annotations| annotations.get(&key)) else { continue };
            match parse(text.trim()) {
                Ok(value) => return Some(value),
                Err(wanted) => self.wrong.push(format!("annotation {key}: {text:?} is not {wanted}")),
            }
        }
        None
    }
}

fn span(text: &str) -> Result<Span, &'static str> {
    const WANTED: &str = "a time such as 500ms or 1m30s, or a range such as 1s-3s";
    let (least, most) = text.split_once('-').unwrap_or((text, text));
    let (least, most) = (duration(least).ok_or(WANTED)?, duration(most).ok_or(WANTED)?);
    if least > most {
        return Err("a range with the smaller time first");
    }
    Ok(Span { least, most })
}

fn endless(text: &str) -> Result<Option<Span>, &'static str> {
    if matches!(text, "forever" | "never") { Ok(None) } else { span(text).map(Some) }
}

fn chance(text: &str) -> Result<f64, &'static str> {
    let number = match text.strip_suffix('%') {
        Some(percent) => percent.trim().parse::<f64>().map(|percent| percent / 100.0),
        None => text.parse(),
    };
    number.ok().filter(|chance| (0.0..=1.0).contains(chance)).ok_or("a number from 0 to 1, or a percentage")
}

fn exit_code(text: &str, least: i32) -> Result<i32, &'static str> {
    let wanted = if least == 0 { "an exit code from 0 to 255" } else { "an exit code from 1 to 255" };
    text.parse().ok().filter(|code| (least..=255).contains(code)).ok_or(wanted)
}

fn word(text: &str) -> Result<String, &'static str> {
    let is_word = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if is_word { Ok(text.to_owned()) } else { Err("one word of letters and digits") }
}

/// Go's way to write times: numbers with units, largest first.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    let mut parts = 0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        let unit_end = rest[end..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| at + end);
        let seconds = match &rest[end..unit_end] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = &rest[unit_end..];
        parts += 1;
    }
    (parts > 0).then_some(total)
}

/// A number with one of the suffixes of quantities.
fn is_quantity(text: &str) -> bool {
    let digits = text.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b'.').count();
    const SUFFIXES: [&str; 15] =
        ["", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei", "u"];
    digits > 0 && text[..digits].parse::<f64>().is_ok() && SUFFIXES.contains(&&text[digits..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> Annotations {
        pairs.iter().map(|(key, value)| (format!("{PREFIX}{key}"), (*value).to_owned())).collect()
    }

    #[test]
    fn times_are_read_as_go_writes_them() {
        let cases = [
            ("500ms", Some(500)),
            ("1m30s", Some(90_000)),
            ("1.5s", Some(1500)),
            ("0", Some(0)),
            ("1h", Some(3_600_000)),
            ("5", None),
            ("s", None),
            ("", None),
            ("1x", None),
            ("-1s", None),
        ];
        for (text, millis) in cases {
            assert_eq!(duration(text).map(|time| time.as_millis()), millis, "{text:?}");
        }
    }

    #[test]
    fn a_pod_speaks_before_its_node_and_that_before_the_default() {
        let pod = annotations(&[("ready-delay", "2s"), ("failure-chance", "25%")]);
        let node = annotations(&[("ready-delay", "9s"), ("start-delay", "1s-3s"), ("run-time", "forever")]);
        let (profile, wrong) = Profile::of(Some(&pod), Some(&node), false);
        assert_eq!(wrong, Vec::<String>::new());
        assert_eq!(profile.ready_delay, Span::exactly(Duration::from_secs(2)));
        assert_eq!(profile.start_delay, Span { least: Duration::from_secs(1), most: Duration::from_secs(3) });
        assert_eq!((profile.failure_chance, profile.run_time, profile.exit_code), (0.25, None, 0));
        let (default, _) = Profile::of(None, None, false);
        assert_eq!(default.run_time, Some(Span::exactly(Duration::from_secs(1))), "a job ends by itself");
        assert_eq!(Profile::of(None, None, true).0.run_time, None);
    }

    #[test]
    fn a_wrong_annotation_is_named_and_does_not_count() {
        let pod = annotations(&[("ready-delay", "soon"), ("failure-chance", "2"), ("exit-code", "300")]);
        let (profile, wrong) = Profile::of(Some(&pod), None, true);
        assert_eq!(profile, Profile::of(None, None, true).0);
        assert_eq!(wrong.len(), 3);
        assert_eq!(
            wrong[0],
            "annotation simulated.knarr.dev/ready-delay: \"soon\" is not a time such as 500ms or 1m30s, or a range such as 1s-3s"
        );
    }

    #[test]
    fn what_is_drawn_is_the_same_for_the_same_pod_and_spread_over_many() {
        let span = Span { least: Duration::from_secs(1), most: Duration::from_secs(3) };
        let uids: Vec<String> = (0..1000).map(|n| format!("uid-{n}")).collect();
        let draw = |uid| Draw { uid, round: 0 };
        assert_eq!(span.draw(draw("a"), "x"), span.draw(draw("a"), "x"));
        let mean = uids.iter().map(|uid| span.draw(draw(uid), "x").as_secs_f64()).sum::<f64>() / 1000.0;
        assert!((1.9..2.1).contains(&mean), "mean {mean}");
        let failures = uids.iter().filter(|uid| draw(uid).happens("failure", 0.2)).count();
        assert!((150..250).contains(&failures), "{failures} of 1000 failed");
    }

    #[test]
    fn capacity_is_the_default_changed_by_what_the_node_says() {
        let node = annotations(&[("capacity", "cpu=8, nvidia.com/gpu=4")]);
        let (capacity, wrong) = capacity(Some(&node));
        assert_eq!(wrong, None);
        assert_eq!(capacity["cpu"].0, "8");
        assert_eq!(capacity["nvidia.com/gpu"].0, "4");
        assert_eq!(capacity["pods"].0, "250");
        let (_, wrong) = super::capacity(Some(&annotations(&[("capacity", "cpu=many")])));
        assert!(wrong.is_some_and(|wrong| wrong.contains("cpu=many")));
    }
}
