//! Configurations as people write them, and the errors they get.

use super::*;
use crate::plugins::{PLUGINS, Point, SpreadDefaults, Strategy};

fn parse(rest: &str) -> Result<Config, Vec<String>> {
    let text = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{rest}");
    Config::parse(&text).map_err(|ConfigError(errors)| errors)
}

fn profile(rest: &str) -> Profile {
    let config = parse(&format!("profiles:\n- schedulerName: p\n{rest}")).expect("a valid profile");
    config.profiles.into_iter().next().expect("one profile")
}

fn names(profile: &Profile, point: Point) -> Vec<(&'static str, i64)> {
    profile.points[&point].iter().map(|(id, weight)| (PLUGINS[*id].name, *weight)).collect()
}

#[test]
fn an_empty_configuration_is_the_default_scheduler() {
    let config = parse("").unwrap();
    assert_eq!(config.profiles.len(), 1);
    let (read, default) = (&config.profiles[0], Profile::default());
    assert_eq!((&read.filters, &read.scores, &read.args), (&default.filters, &default.scores, &default.args));
    let scores: Vec<(&str, i64)> =
        default.scores.iter().map(|(id, weight)| (PLUGINS[*id].name, *weight)).collect();
    let upstream = [
        ("TaintToleration", 3),
        ("NodeAffinity", 2),
        ("NodeResourcesFit", 1),
        ("PodTopologySpread", 2),
        ("InterPodAffinity", 2),
        ("NodeResourcesBalancedAllocation", 1),
        ("ImageLocality", 1),
    ];
    assert_eq!(scores, upstream);
}

#[test]
fn plugins_are_switched_and_weighed_per_point_and_for_all() {
    let p = profile(
        "  plugins:
    multiPoint:
      enabled: [{name: ImageLocality, weight: 7}]
      disabled: [{name: NodePorts}]
    score:
      enabled: [{name: TaintToleration, weight: 9}]
      disabled: [{name: InterPodAffinity}]
    filter:
      disabled: [{name: '*'}]
      enabled: [{name: NodeResourcesFit}]
",
    );
    let expected = [
        ("TaintToleration", 9),
        ("NodeAffinity", 2),
        ("NodeResourcesFit", 1),
        ("PodTopologySpread", 2),
        ("NodeResourcesBalancedAllocation", 1),
        ("ImageLocality", 7),
    ];
    let scored: Vec<(&str, i64)> = p.scores.iter().map(|(id, weight)| (PLUGINS[*id].name, *weight)).collect();
    assert_eq!(scored, expected);
    assert_eq!(names(&p, Point::Filter), [("NodeResourcesFit", 1)]);
    assert!(p.preempts());
    let p = profile("  plugins: {postFilter: {disabled: [{name: DefaultPreemption}]}}\n");
    assert!(!p.preempts());
}

#[test]
fn arguments_reach_their_plugins() {
    let p = profile(
        "  percentageOfNodesToScore: 30
  pluginConfig:
  - name: NodeResourcesFit
    args:
      apiVersion: kubescheduler.config.k8s.io/v1
      kind: NodeResourcesFitArgs
      ignoredResourceGroups: [example.com]
      scoringStrategy:
        type: RequestedToCapacityRatio
        resources: [{name: cpu, weight: 3}, {name: x.io/gpu}]
        requestedToCapacityRatio: {shape: [{utilization: 0, score: 0}, {utilization: 100, score: 10}]}
  - name: InterPodAffinity
    args: {hardPodAffinityWeight: 5, ignorePreferredTermsOfExistingPods: true}
  - name: PodTopologySpread
    args:
      defaultingType: List
      defaultConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: DoNotSchedule}]
  - name: VolumeBinding
    args: {bindTimeoutSeconds: 20}
  - name: DefaultPreemption
    args: {minCandidateNodesPercentage: 5, minCandidateNodesAbsolute: 20}
",
    );
    assert_eq!(p.percentage_of_nodes_to_score, 30);
    let resources = vec![("cpu".to_owned(), 3), ("x.io/gpu".to_owned(), 1)];
    assert_eq!(p.args.fit.strategy, Strategy::RequestedToCapacityRatio(resources, vec![(0, 0), (100, 100)]));
    assert_eq!((p.args.affinity.hard_weight, p.args.affinity.ignores_preferences_of_existing), (5, true));
    assert_eq!(p.args.spread.defaults, SpreadDefaults::List(vec![("zone".to_owned(), 1, true)]));
    assert_eq!(p.args.volume_binding.bind_timeout, Duration::from_secs(20));
    assert_eq!(p.args.preemption.min_candidate_nodes_absolute, 20);
}

#[test]
fn errors_name_the_field() {
    let cases = [
        (
            "percentageOfNodesToScore: 101",
            "percentageOfNodesToScore: Invalid value: 101: not in valid range [0-100]",
        ),
        ("podInitialBackoffSeconds: 0", "podInitialBackoffSeconds: Invalid value: must be greater than 0"),
        (
            "podMaxBackoffSeconds: 0",
            "podMaxBackoffSeconds: Invalid value: must be greater than or equal to PodInitialBackoffSeconds",
        ),
        ("colour: red", "strict decoding error: unknown field \"colour\""),
        ("profiles: [{}]", "profiles[0].schedulerName: Required value"),
        (
            "profiles: [{schedulerName: a}, {schedulerName: a}]",
            "profiles[1].schedulerName: Duplicate value: \"a\"",
        ),
        (
            "profiles: [{schedulerName: a, plugins: {score: {enabled: [{name: Nope}]}}}]",
            "profiles[0].plugins.score.enabled[0].name: Invalid value: \"Nope\": plugin does not exist",
        ),
        (
            "profiles: [{schedulerName: a, plugins: {score: {enabled: [{name: NodeName}]}}}]",
            "profiles[0].plugins.score.enabled[0].name: Invalid value: \"NodeName\": plugin does not extend Score plugin",
        ),
        (
            "profiles: [{schedulerName: a, plugins: {bind: {disabled: [{name: '*'}]}}}]",
            "profiles[0].plugins.bind: Required value: at least one bind plugin is needed",
        ),
        (
            "profiles: [{schedulerName: a, pluginConfig: [{name: InterPodAffinity, args: {hardPodAffinityWeight: 101}}]}]",
            "profiles[0].pluginConfig[0].args.hardPodAffinityWeight: Invalid value: 101: not in valid range [0-100]",
        ),
        (
            "extenders: [{urlPrefix: 'http://e', prioritizeVerb: p}]",
            "extenders[0].weight: Invalid value: 0: must have a positive weight applied to it",
        ),
        ("extenders: [{}]", "extenders[0].urlPrefix: Invalid value: \"\": must be a URL"),
        ("parallelism: many", "parallelism: Invalid value: \"many\": must be an integer"),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    for (text, expected) in cases {
        assert_eq!(parse(text).expect_err(text), [expected], "{text}");
    }
    assert!(Config::parse("kind: Pod").is_err());
}

#[test]
fn a_lease_is_stood_for_only_when_asked() {
    assert_eq!(parse("").unwrap().election, None);
    assert_eq!(parse("leaderElection: {leaderElect: false}").unwrap().election, None);
    let elected =
        parse("leaderElection: {leaseDuration: 30s, resourceName: mine}").unwrap().election.unwrap();
    assert_eq!((elected.name.as_str(), elected.lease), ("mine", Duration::from_secs(30)));
}
