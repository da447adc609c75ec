//! The simulator itself: the same seed is the same run, and planted bugs are found.

use std::process::{Child, Command, Output, Stdio};

/// A seed under which every canary is found.
const CANARY_SEED: &str = "1";

fn start(args: &[&str]) -> Child {
    let program = env!("CARGO_BIN_EXE_knarr-sim");
    Command::new(program)
        .arg("replay")
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the simulator starts")
}

fn finish(child: Child) -> (Output, String) {
    let output = child.wait_with_output().expect("the simulator ends");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output, said)
}

/// The line that tells the trace's number.
fn digest(said: &str) -> &str {
    let line =
        said.lines().find(|line| line.starts_with("seed ")).unwrap_or_else(|| panic!("no result in {said}"));
    line.split_once("trace ").expect("the line tells the trace's number").1
}

#[test]
fn the_same_seed_gives_the_same_trace_and_another_seed_another() {
    let runs = ["13", "13", "1"].map(|seed| start(&[seed, "--quiet", "--canary", "lost-write"])).map(finish);
    let digests = runs.each_ref().map(|(_, said)| digest(said));
    assert_eq!(digests[0], digests[1]);
    assert_ne!(digests[0], digests[2]);
}

#[test]
fn every_planted_bug_is_found() {
    let cases = [
        ("lost-write", "acknowledged write lost"),
        ("dropped-event", "has a gap"),
        ("forgotten-expectations", "pods of a replica set that wishes for"),
    ];
    let running = cases.map(|(name, _)| start(&[CANARY_SEED, "--quiet", "--canary", name]));
    for ((name, what), child) in cases.into_iter().zip(running) {
        let (output, said) = finish(child);
        assert_eq!(output.status.code(), Some(1), "{name}: {said}");
        let violated = said.lines().any(|line| line.starts_with("violated:") && line.contains(what));
        assert!(violated, "{name} is found as {what:?}: {said}");
    }
}

#[test]
fn without_a_planted_bug_that_seed_is_clean() {
    let (output, said) = finish(start(&[CANARY_SEED, "--quiet"]));
    assert!(output.status.success(), "{said}");
}
