//! The simulator itself: the same seed is the same run, and planted bugs are found.

use std::process::{Child, Command, Output, Stdio};

/// Seeds of which at least one finds each canary. Any change of the system gives a seed another life, so one alone would
/// fail now and then without anything being wrong.
const CANARY_SEEDS: [&str; 3] = ["1", "3", "5"];

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
    for (name, what) in cases {
        let finds = |seed: &&str| {
            let (output, said) = finish(start(&[seed, "--quiet", "--canary", name]));
            let violated = said.lines().any(|line| line.starts_with("violated:") && line.contains(what));
            violated && output.status.code() == Some(1)
        };
        assert!(CANARY_SEEDS.iter().any(finds), "no seed finds {name} as {what:?}");
    }
}

#[test]
fn without_a_planted_bug_the_first_of_them_is_clean() {
    let (output, said) = finish(start(&[CANARY_SEEDS[0], "--quiet"]));
    assert!(output.status.success(), "{said}");
}
