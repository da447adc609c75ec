//! Every fuzz target on mutated inputs, for a moment: `FUZZ_ROUNDS=1000000` makes it longer, `FUZZ_SEED` another run.
//! A failure prints the target, the seed and the input; put the input among the seeds below when it is mended.

use knarr_api::fuzz::TARGETS;
use knarr_api::schema::Schema;

/// Rounds of each target in an ordinary test run.
const ROUNDS: usize = 1500;
/// Inputs grow no larger.
const INPUT_BYTES_MAX: usize = 4096;

/// Pieces that decoders care about.
const TOKENS: &[&str] = &[
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "9223372036854775808",
    "\"\"",
    "{}",
    "[]",
    "[null]",
    "\"\\u0000\"",
    "\"$patch\":\"delete\"",
    "\"$patch\":\"replace\"",
    "\"$retainKeys\":[\"a\"]",
    "\"$setElementOrder/containers\":[{\"name\":\"x\"}]",
    "\"$deleteFromPrimitiveList/finalizers\":[\"x/y\"]",
    "\"metadata\":",
    "\"spec\":",
    "\"status\":",
    "\"template\":",
    "\"containers\":[{\"name\":\"x\"}]",
    "\"resources\":{\"limits\":{\"cpu\":\"1\"}}",
    "\"clusterIPs\":[\"None\"]",
    "\"type\":\"NodePort\"",
    "\"ports\":[{\"port\":1}]",
    "{\"op\":\"copy\",\"from\":\"\",\"path\":\"/x\"}",
    "{\"op\":\"add\",\"path\":\"/spec/-\",\"value\":1}",
    "f:spec",
    "k:{\"name\":\"a\"}",
    "v:1",
    ".",
    "&a",
    "*a",
    "<<: ",
    "!!binary ",
    "|\n",
    "---\n",
    "1Gi",
    "1e3",
    "-5m",
    "100n",
    ".5",
    "1E",
    "Ki",
    "in (a,b)",
    "!=",
    "notin (",
    "* * * * *",
    "@every 1s",
    "*/0",
    "L",
    "\u{feff}",
    "\x00",
    "\u{1f600}",
];

const SEEDS: &[&str] = &[
    r#"{"metadata":{"name":"a","labels":{"a":"b"}},"spec":{"replicas":1,"selector":{"matchLabels":{"a":"b"}},"template":{"metadata":{"labels":{"a":"b"}},"spec":{"containers":[{"name":"c","image":"i","ports":[{"containerPort":80}],"resources":{"limits":{"cpu":"1"}}}],"volumes":[{"name":"v","configMap":{"name":"m"}}]}}}}"#,
    r#"{"metadata":{"name":"a"},"spec":{"type":"NodePort","ports":[{"name":"p","port":80,"targetPort":"http","nodePort":30000}],"clusterIP":"None","ipFamilyPolicy":"PreferDualStack","selector":{"a":"b"}}}"#,
    r#"{"metadata":{"name":"xs.acme.io"},"spec":{"group":"acme.io","scope":"Cluster","names":{"plural":"xs","kind":"X"},"versions":[{"name":"v1","served":true,"storage":true,"schema":{"openAPIV3Schema":{"type":"object","properties":{"a":{"type":"integer","default":1,"minimum":0}}}}}]}}"#,
    r#"[{"op":"add","path":"/metadata/labels/x","value":"y"},{"op":"copy","from":"/spec","path":"/spec/x"},{"op":"move","from":"/data","path":"/d"},{"op":"test","path":"/kind","value":"Pod"}]"#,
    r#"{"spec":{"containers":[{"name":"x","$patch":"delete"}],"$setElementOrder/containers":[{"name":"x"}]},"metadata":{"$retainKeys":["name"],"finalizers":["a/b"]}}"#,
    r#"{"f:metadata":{"f:labels":{".":{},"f:a":{}}},"f:spec":{"f:containers":{"k:{\"name\":\"a\"}":{".":{},"f:image":{}}},"f:x":{"v:\"y\"":{}}}}"#,
    r#"{"type":"object","properties":{"a":{"type":"string","pattern":"^a+$"}},"oneOf":[{"required":["a"]}]} {"a":"aaa"}"#,
    "metadata:\n  name: a\n  labels: &l\n    a: b\nspec:\n  selector:\n    matchLabels: *l\n  template: {spec: {containers: [{name: c, image: i}]}}\n",
    "a=b,c!=d,e in (f,g),h notin (i),j,!k",
    "metadata.name=a,spec.nodeName!=b",
    "12.345Gi",
    "*/5 0-6 1,15 * MON-FRI",
    // Found by fuzzing, and mended.
];

/// Mutates by a generator of its own (SplitMix64), so that a seed means the same for ever.
struct Mutator {
    state: u64,
}

impl Mutator {
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        if bound == 0 { 0 } else { (self.next() % bound as u64) as usize }
    }

    fn input(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut input = seeds[self.below(seeds.len())].clone();
        // The first byte chooses the kind.
        input.insert(0, self.below(256) as u8);
        for _ in 0..self.below(8) {
            self.mutate(&mut input, seeds);
        }
        input.truncate(INPUT_BYTES_MAX);
        input
    }

    fn mutate(&mut self, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let end = (at + self.below(20)).min(input.len());
        match self.below(8) {
            0 if at < input.len() => input[at] ^= 1 << self.below(8),
            1 if at < input.len() => input[at] = self.below(256) as u8,
            2 => drop(input.drain(at..end)),
            3 => {
                let piece = input[at..end].to_vec();
                let to = self.below(input.len() + 1);
                input.splice(to..to, piece);
            }
            4 => {
                let other = &seeds[self.below(seeds.len())];
                let from = self.below(other.len() + 1);
                input.splice(at.., other[from..].iter().copied());
            }
            5 => self.replace_value(input),
            _ => {
                let token = TOKENS[self.below(TOKENS.len())].as_bytes().to_vec();
                input.splice(at..end.min(at + self.below(4)), token);
            }
        }
    }

    /// Puts another value where JSON has one: after a colon, up to the next comma or brace.
    fn replace_value(&mut self, input: &mut Vec<u8>) {
        let colons: Vec<usize> = (0..input.len()).filter(|i| input[*i] == b':').collect();
        if colons.is_empty() {
            return;
        }
        let from = colons[self.below(colons.len())] + 1;
        let end = input[from..].iter().position(|b| b",}]".contains(b)).map_or(input.len(), |n| from + n);
        let token = TOKENS[self.below(13)].as_bytes().to_vec();
        input.splice(from..end, token);
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_decoder_panics_or_breaks_its_promise() {
    let rounds = number("FUZZ_ROUNDS").map_or(ROUNDS, |n| n as usize);
    let seed = number("FUZZ_SEED").unwrap_or(1);
    let schema = Schema::builtin();
    let mut seeds: Vec<Vec<u8>> = SEEDS.iter().map(|s| s.as_bytes().to_vec()).collect();
    // Every seed that is an object of some kind is also one in protobuf.
    for text in SEEDS {
        let Ok(value) = serde_json::from_str::<serde_json::Value>(text) else { continue };
        for (group, plural) in
            [("apps", "deployments"), ("", "services"), ("apiextensions.k8s.io", "customresourcedefinitions")]
        {
            let kind = schema.resource(group, "v1", plural).expect("built in");
            if let Ok(decoded) = knarr_api::decode::value(schema, kind.type_id, value.clone()) {
                seeds.push(knarr_api::protobuf::encode(schema, kind.type_id, &decoded.value));
            }
        }
    }
    for (name, target) in TARGETS {
        let mut mutator = Mutator { state: seed };
        for round in 0..rounds {
            let input = mutator.input(&seeds);
            let outcome = std::panic::catch_unwind(|| target(&input));
            if outcome.is_err() {
                panic!("{name}, seed {seed}, round {round}: {:?}", String::from_utf8_lossy(&input));
            }
        }
    }
}
