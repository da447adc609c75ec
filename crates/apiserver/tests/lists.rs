//! Lists and watches: options, pages, expired tokens, selectors, and that no event is missed or repeated.

mod common;

use common::{Client, Events, server, server_after};
use knarr_api::object::Object;
use knarr_apiserver::api::Api;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
fn map(name: &str, label: &str) -> Value {
    json!({ "metadata": { "name": name, "labels": { "l": label } } })
}

#[tokio::test]
async fn objects_that_are_not_stored_are_listed_in_every_form() {
    let api = server().await;
    let _running = api.registry.health.running("scheduler");
    let admin = Client::admin(&api);
    for accept in ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"] {
        let reply = admin.ask("GET", "/api/v1/componentstatuses", &[("accept", accept)], "").await;
        assert_eq!((reply.status, reply.header("content-type")), (200, accept));
        assert!(String::from_utf8_lossy(&reply.body).contains("scheduler"), "{accept}");
    }
    let (_, list) = admin.get("/api/v1/componentstatuses").await;
    let scheduler = &list["items"][1];
    assert_eq!(
        (&scheduler["metadata"]["name"], scheduler.get("kind")),
        (&json!("scheduler"), None),
        "{list}"
    );
}

#[tokio::test]
async fn options_that_do_not_go_together_are_refused() {
    let api = server().await;
    let admin = Client::admin(&api);
    for (query, why) in [
        (
            "resourceVersionMatch=Exact",
            "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided",
        ),
        (
            "resourceVersion=0&resourceVersionMatch=Exact",
            "resourceVersionMatch: Forbidden: resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
        ),
        (
            "resourceVersion=1&resourceVersionMatch=Maybe",
            "resourceVersionMatch: Unsupported value: \"Maybe\": supported values: \"Exact\", \"NotOlderThan\", \"\"",
        ),
        ("sendInitialEvents=true", "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for list"),
        (
            "watch=1&sendInitialEvents=true",
            "resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        ),
        (
            "watch=1&resourceVersionMatch=NotOlderThan",
            "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
        ),
    ] {
        let (status, answer) = admin.get(&format!("{MAPS}?{query}")).await;
        assert_eq!(status, 422, "{query}: {answer}");
        assert_eq!(answer["message"], format!("ListOptions.meta.k8s.io \"\" is invalid: {why}"), "{query}");
    }
    let (status, answer) = admin.get(&format!("{MAPS}?resourceVersion=999999")).await;
    assert_eq!((status, &answer["reason"]), (504, &json!("Timeout")));
    assert_eq!(answer["details"]["causes"][0]["reason"], "ResourceVersionTooLarge");
}

#[tokio::test]
async fn pages_are_of_one_moment_until_it_is_compacted() {
    let api = server().await;
    let admin = Client::admin(&api);
    for i in 0..5 {
        admin.create(MAPS, &map(&format!("m{i}"), "a")).await;
    }
    let (_, first) = admin.get(&format!("{MAPS}?limit=2")).await;
    assert_eq!(first["items"].as_array().map(Vec::len), Some(2));
    assert_eq!(first["metadata"]["remainingItemCount"], 3);
    admin.delete(&format!("{MAPS}/m3")).await;
    let token = first.str_at("metadata.continue");
    let (_, second) = admin.get(&format!("{MAPS}?limit=2&continue={token}")).await;
    let names =
        |list: &Value| -> Vec<String> { list.list_at("items").iter().map(|i| i.name().to_owned()).collect() };
    assert_eq!(names(&second), ["m2", "m3"], "the snapshot still has what was deleted");
    assert_eq!(second["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    api.registry.store.compact(api.registry.store.revision());
    let (status, expired) = admin.get(&format!("{MAPS}?limit=2&continue={token}")).await;
    assert_eq!((status, &expired["reason"]), (410, &json!("Expired")), "{expired}");
    let token = expired.str_at("metadata.continue");
    let (status, rest) = admin.get(&format!("{MAPS}?continue={token}")).await;
    assert_eq!(
        (status, names(&rest)),
        (200, vec!["m2".to_owned(), "m4".to_owned()]),
        "the present state from there on"
    );
    let (status, _) = admin.get(&format!("{MAPS}?continue=nonsense")).await;
    assert_eq!(status, 400);
    let old = first.str_at("metadata.resourceVersion");
    let (status, _) = admin.get(&format!("{MAPS}?resourceVersion={old}&resourceVersionMatch=Exact")).await;
    assert_eq!(status, 410);
}

#[tokio::test]
async fn selectors_turn_changes_into_arrivals_and_departures() {
    let api = server().await;
    let admin = Client::admin(&api);
    let mut events =
        Events::open(&api, &format!("{MAPS}?watch=1&labelSelector=l%3Da&resourceVersion=1")).await;
    admin.create(MAPS, &map("x", "b")).await;
    let one = format!("{MAPS}/x");
    admin.patch(&one, &json!({ "metadata": { "labels": { "l": "a" } } })).await;
    admin.patch(&one, &json!({ "data": { "k": "1" } })).await;
    let (_, left) = admin.patch(&one, &json!({ "metadata": { "labels": { "l": "c" } } })).await;
    for expected in ["ADDED", "MODIFIED", "DELETED"] {
        let (kind, object) = events.next().await;
        assert_eq!(kind, expected, "{object}");
        if kind == "DELETED" {
            assert_eq!(object["metadata"]["labels"]["l"], "a", "the state it was last seen in");
            assert_eq!(object["metadata"]["resourceVersion"], left["metadata"]["resourceVersion"]);
        }
    }
}

#[tokio::test]
async fn initial_events_end_with_their_bookmark() {
    let api = server().await;
    let admin = Client::admin(&api);
    admin.create(MAPS, &map("x", "a")).await;
    let query = "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&labelSelector=l";
    let mut events = Events::open(&api, &format!("{MAPS}?{query}")).await;
    assert_eq!(events.next().await.0, "ADDED");
    let (kind, object) = events.next().await;
    assert_eq!(kind, "BOOKMARK");
    assert_eq!(object["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    admin.create(MAPS, &map("y", "a")).await;
    assert_eq!(events.next().await.0, "ADDED");
}

/// Lists, watches from there, and checks each event against what it knows, until the last object comes.
async fn follow(api: &Api, selector: &str) -> BTreeMap<String, u64> {
    let admin = Client::admin(api);
    let (_, list) = admin.get(&format!("{MAPS}?labelSelector={selector}")).await;
    let revision =
        |object: &Value| object.str_at("metadata.resourceVersion").parse::<u64>().expect("a revision");
    let mut known: BTreeMap<String, u64> =
        list.list_at("items").iter().map(|o| (o.name().to_owned(), revision(o))).collect();
    let from = list.str_at("metadata.resourceVersion");
    let mut newest = from.parse::<u64>().expect("a revision");
    let mut events =
        Events::open(api, &format!("{MAPS}?watch=1&labelSelector={selector}&resourceVersion={from}")).await;
    loop {
        let (kind, object) = events.next().await;
        let (name, at) = (object.name().to_owned(), revision(&object));
        assert!(at > newest, "{selector}: {kind} {name} at {at} after {newest}: repeated or out of order");
        newest = at;
        match kind.as_str() {
            "ADDED" => assert!(known.insert(name.clone(), at).is_none(), "{selector}: {name} added twice"),
            "MODIFIED" => {
                assert!(known.insert(name.clone(), at).is_some(), "{selector}: {name} changed unseen")
            }
            "DELETED" => assert!(known.remove(&name).is_some(), "{selector}: {name} deleted unseen"),
            other => panic!("{other}: {object}"),
        }
        if name == "zz-last" {
            return known;
        }
    }
}

async fn write_at_random(api: &Api, seed: u64) {
    let admin = Client::admin(api);
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..150 {
        let name = format!("m{}", random.random_range(0..12));
        let label = ["a", "b"][random.random_range(0..2)];
        match random.random_range(0..4) {
            0 => drop(admin.delete(&format!("{MAPS}/{name}")).await),
            1 => drop(admin.post(MAPS, &map(&name, label)).await),
            2 => {
                let labels = json!({ "metadata": { "labels": { "l": label } } });
                drop(admin.patch(&format!("{MAPS}/{name}"), &labels).await);
            }
            _ => {
                let data = json!({ "data": { "k": random.random::<u32>().to_string() } });
                drop(admin.patch(&format!("{MAPS}/{name}"), &data).await);
            }
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_list_and_a_watch_from_it_miss_and_repeat_nothing() {
    for seed in 0..6 {
        let api = server().await;
        let writers = async {
            tokio::join!(write_at_random(&api, seed), write_at_random(&api, seed + 100));
            let last = json!({ "metadata": { "name": "zz-last", "labels": { "l": "a", "all": "" } } });
            Client::admin(&api).create(MAPS, &last).await;
        };
        let late = async {
            for _ in 0..40 {
                tokio::task::yield_now().await;
            }
            follow(&api, "l").await
        };
        let (everything, some, later, ()) =
            tokio::join!(follow(&api, "l"), follow(&api, "l%3Da"), late, writers);
        let admin = Client::admin(&api);
        for (selector, known) in [("l", everything), ("l%3Da", some), ("l", later)] {
            let (_, list) = admin.get(&format!("{MAPS}?labelSelector={selector}")).await;
            let truth: BTreeMap<String, u64> = list
                .list_at("items")
                .iter()
                .map(|o| {
                    (o.name().to_owned(), o.str_at("metadata.resourceVersion").parse().expect("a revision"))
                })
                .collect();
            assert_eq!(known, truth, "seed {seed}, selector {selector}");
        }
    }
}

#[tokio::test]
async fn a_collection_is_deleted_page_by_page() {
    let api = server().await;
    let admin = Client::admin(&api);
    let maps = "/api/v1/namespaces/default/configmaps";
    for i in 0..5 {
        let labels = json!({ "kept": (i == 0).to_string() });
        admin.create(maps, &json!({ "metadata": { "name": format!("m{i}"), "labels": labels } })).await;
    }
    let (status, page) = admin.delete(&format!("{maps}?limit=2&labelSelector=kept%3Dfalse")).await;
    assert_eq!((status, page["items"].as_array().map(Vec::len)), (200, Some(2)), "{page}");
    let token = page["metadata"]["continue"].as_str().expect("a token").to_owned();
    let (_, page) =
        admin.delete(&format!("{maps}?limit=2&labelSelector=kept%3Dfalse&continue={token}")).await;
    assert_eq!(page["items"].as_array().map(Vec::len), Some(2), "{page}");
    assert_eq!(page["metadata"]["continue"], Value::Null);
    let (_, left) = admin.get(maps).await;
    assert_eq!(left["items"].as_array().map(Vec::len), Some(1));
    let (status, shown) = admin.delete(&format!("{maps}?dryRun=All")).await;
    let named = |item: &Value| item["metadata"]["name"].is_string() && item.get("kind").is_none();
    assert!(
        shown["items"].as_array().is_some_and(|items| !items.is_empty() && items.iter().all(named)),
        "{shown}"
    );
    assert_eq!((status, admin.get(&format!("{maps}/m0")).await.0), (200, 200), "a dry run deletes nothing");
}

/// Found by the simulator: history that was read back from the log told deletions with the version before them, so
/// that a client that went on from there saw them twice.
#[tokio::test]
async fn a_deletion_before_a_restart_is_told_with_its_own_version() {
    let memory = knarr_store::engine::Memory::default();
    let api = server_after(&memory).await;
    let admin = Client::admin(&api);
    let created = admin.create(MAPS, &map("m", "a")).await;
    let from = created.str_at("metadata.resourceVersion");
    admin.delete(&format!("{MAPS}/m")).await;
    let deleted = api.registry.store.revision();
    drop(api);
    let api = server_after(&memory).await;
    let mut events = Events::open(&api, &format!("{MAPS}?watch=1&resourceVersion={from}")).await;
    let (kind, object) = events.next().await;
    assert_eq!((kind.as_str(), object.str_at("metadata.name")), ("DELETED", "m"));
    assert_eq!(object.str_at("metadata.resourceVersion"), deleted.to_string());
}

/// Found by the simulator: each further forced deletion was a write, which woke the controller that had asked.
#[tokio::test]
async fn a_pod_held_by_finalizers_is_force_deleted_once() {
    const PODS: &str = "/api/v1/namespaces/default/pods";
    let api = server().await;
    let admin = Client::admin(&api);
    let pod = json!({
        "metadata": { "name": "p", "finalizers": ["example.com/hold"] },
        "spec": { "containers": [{ "name": "c", "image": "i" }] },
    });
    admin.create(PODS, &pod).await;
    admin.delete(&format!("{PODS}/p?gracePeriodSeconds=0")).await;
    let before = api.registry.store.revision();
    let (status, _) = admin.delete(&format!("{PODS}/p?gracePeriodSeconds=0")).await;
    assert_eq!((status, api.registry.store.revision()), (200, before));
}
