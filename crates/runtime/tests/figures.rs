//! Figures, not judgements: how long starts take and what the keeper weighs. `cargo test --release -- --ignored
//! --nocapture figures` prints them.

mod common;

use std::time::{Duration, Instant};

use common::{Node, can_run, container};
use knarr_runtime::Runtime;
use knarr_runtime::cri::v1;

const ROUNDS: usize = 30;

#[tokio::test]
#[ignore = "prints figures"]
async fn figures() {
    if !can_run() {
        return;
    }
    let node = Node::start().await;
    let empty = pss(node.runtime.keeper_pid());
    let mut times: [Vec<Duration>; 5] = Default::default();
    for round in 0..ROUNDS {
        let begun = Instant::now();
        let mut lap = begun;
        let mut take = |index: usize, times: &mut [Vec<Duration>; 5]| {
            times[index].push(lap.elapsed());
            lap = Instant::now();
        };
        let sandbox = node.sandbox(&format!("pod{round}")).await;
        take(0, &mut times);
        let id = node.create(&sandbox, container(&format!("c{round}"), &["true"])).await;
        take(1, &mut times);
        node.runtime.start_container(&id).await.unwrap();
        take(2, &mut times);
        times[3].push(begun.elapsed());
        node.wait_exit(&id).await;
        let lap = Instant::now();
        node.runtime.stop_pod_sandbox(&sandbox).await.unwrap();
        node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
        times[4].push(lap.elapsed());
    }
    for (name, times) in ["sandbox", "create", "start", "sum", "remove pod"].iter().zip(&mut times) {
        times.sort();
        println!("{name}: p50 {:.1?} p90 {:.1?}", times[ROUNDS / 2], times[ROUNDS * 9 / 10]);
    }
    let begun = Instant::now();
    let started = futures::future::join_all((0..ROUNDS).map(|round| {
        let node = &node;
        async move {
            let begun = Instant::now();
            let sandbox = node.sandbox(&format!("many{round}")).await;
            let id = node.create(&sandbox, container(&format!("m{round}"), &["sleep", "1000"])).await;
            node.runtime.start_container(&id).await.unwrap();
            (id, begun.elapsed())
        }
    }))
    .await;
    let mut each: Vec<Duration> = started.iter().map(|(_, time)| *time).collect();
    each.sort();
    println!(
        "{ROUNDS} pods at once: all in {:.1?}, p50 {:.1?} p99 {:.1?}",
        begun.elapsed(),
        each[ROUNDS / 2],
        each[ROUNDS - 1]
    );
    let begun = Instant::now();
    node.sh(&started[0].0, "true").await;
    println!("exec: {:.1?}", begun.elapsed());
    let full = pss(node.runtime.keeper_pid());
    println!(
        "keeper: {empty} KiB empty, {full} KiB with {ROUNDS} containers, {} KiB a container",
        (full - empty) / ROUNDS as i64
    );
    let filter = v1::ContainerFilter::default();
    assert!(node.runtime.list_containers(Some(filter)).await.unwrap().len() >= ROUNDS);
}

/// Private and proportional memory of a process, in KiB.
fn pss(pid: i32) -> i64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
