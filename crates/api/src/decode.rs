//! Bytes to object: one pass that parses, checks types, prunes unknown fields and canonicalises leaves.
//!
//! The schema drives serde, so a field that the kind does not have is never built. What would be lost
//! (unknown and duplicate fields) is reported to the caller, who errs, warns or ignores by
//! `fieldValidation`. Type errors stop the decode, worded as Go's decoder does.

use std::cell::RefCell;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::quantity::{self, Quantity};
use crate::schema::{Field, Schema, Shape, TypeId};

/// How many unknown or duplicate fields are reported; upstream's limit too.
pub const ISSUES_MAX: usize = 100;

/// A decoded object and what was dropped from it.
#[derive(Debug)]
pub struct Decoded {
    pub value: Value,
    /// `unknown field "spec.x"`, `duplicate field "spec.y"`, in order of appearance.
    pub issues: Vec<String>,
}

/// Why bytes are no object: the text upstream's decoder gives.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct DecodeError(pub String);

/// Decodes JSON bytes as the type.
pub fn json(schema: &Schema, type_id: TypeId, bytes: &[u8]) -> Result<Decoded, DecodeError> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let decoded = run(schema, type_id, &mut reader)?;
    reader.end().map_err(|e| syntax_error(&e))?;
    Ok(decoded)
}

/// Decodes a tree as the type: YAML bodies and the results of patches.
pub fn value(schema: &Schema, type_id: TypeId, value: Value) -> Result<Decoded, DecodeError> {
    run(schema, type_id, value)
}

/// Reads one YAML document as a tree; aliases are bounded by the parser's own limit.
pub fn yaml(bytes: &[u8]) -> Result<Value, DecodeError> {
    let fail = |e: serde_yaml_ng::Error| DecodeError(format!("error converting YAML to JSON: yaml: {e}"));
    let tree: serde_yaml_ng::Value = serde_yaml_ng::from_slice(bytes).map_err(fail)?;
    yaml_to_json(tree)
}

/// Reads one YAML document as an object of the type. Kubernetes reads YAML 1.1, in which `0400` is octal and `yes` is
/// true; where the type wants a number or a truth, such words are one.
pub fn yaml_as(schema: &Schema, type_id: TypeId, bytes: &[u8]) -> Result<Value, DecodeError> {
    let mut tree = yaml(bytes)?;
    old_scalars(schema, &Shape::Object(type_id), &mut tree);
    Ok(tree)
}

fn old_scalars(schema: &Schema, shape: &Shape, value: &mut Value) {
    match (shape, &mut *value) {
        (Shape::Object(id), Value::Object(map)) => {
            let structure = schema.type_of(*id);
            for (name, value) in map {
                if let Some(field) = structure.field(name) {
                    old_scalars(schema, &field.shape, value);
                }
            }
        }
        (Shape::List(inner), Value::Array(items)) => {
            items.iter_mut().for_each(|item| old_scalars(schema, inner, item));
        }
        (Shape::Map(inner), Value::Object(map)) => {
            map.values_mut().for_each(|item| old_scalars(schema, inner, item));
        }
        (Shape::Int32 | Shape::Int64, Value::String(text)) => {
            let digits = text.strip_prefix("0o").or_else(|| text.strip_prefix('0'));
            let number = digits.filter(|d| !d.is_empty()).and_then(|d| i64::from_str_radix(d, 8).ok());
            if let Some(number) = number {
                *value = number.into();
            }
        }
        (Shape::Bool, Value::String(text)) => match text.to_ascii_lowercase().as_str() {
            "yes" | "on" | "y" => *value = true.into(),
            "no" | "off" | "n" => *value = false.into(),
            _ => {}
        },
        _ => {}
    }
}

/// YAML trees have more key types than JSON: scalars become strings, as `sigs.k8s.io/yaml` does.
pub fn yaml_to_json(tree: serde_yaml_ng::Value) -> Result<Value, DecodeError> {
    use serde_yaml_ng::Value as Yaml;
    Ok(match tree {
        Yaml::Null => Value::Null,
        Yaml::Bool(b) => Value::Bool(b),
        Yaml::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(i), _, _) => i.into(),
            (_, Some(u), _) => u.into(),
            (_, _, f) => f.and_then(Number::from_f64).map_or(Value::Null, Value::Number),
        },
        Yaml::String(s) => Value::String(s),
        Yaml::Sequence(items) => Value::Array(items.into_iter().map(yaml_to_json).collect::<Result<_, _>>()?),
        Yaml::Mapping(entries) => {
            let mut map = Map::new();
            for (key, value) in entries {
                let key = match key {
                    Yaml::String(s) => s,
                    Yaml::Bool(b) => b.to_string(),
                    Yaml::Number(n) => n.to_string(),
                    Yaml::Null => "null".to_owned(),
                    _ => return Err(DecodeError("error converting YAML to JSON: a key is no scalar".into())),
                };
                map.insert(key, yaml_to_json(value)?);
            }
            Value::Object(map)
        }
        Yaml::Tagged(tagged) => yaml_to_json(tagged.value)?,
    })
}

fn run<'de, D>(schema: &Schema, type_id: TypeId, reader: D) -> Result<Decoded, DecodeError>
where
    D: Deserializer<'de, Error: fmt::Display>,
{
    let context = Context { schema, state: RefCell::default() };
    let shape = Shape::Object(type_id);
    let seed = Seed { context: &context, shape: &shape, owner: "" };
    let result = seed.deserialize(reader);
    let state = context.state.into_inner();
    match result {
        // Type errors were worded where they happened; what is left is syntax.
        Err(error) => Err(state.failure.map_or_else(|| syntax_error(&error), DecodeError)),
        Ok(value) => Ok(Decoded { value: value.unwrap_or(Value::Null), issues: state.issues }),
    }
}

fn syntax_error(error: &dyn fmt::Display) -> DecodeError {
    let text = error.to_string();
    if text.starts_with("EOF") {
        return DecodeError("unexpected end of JSON input".into());
    }
    DecodeError(format!("couldn't get version/kind; json parse error: {text}"))
}

struct Context<'s> {
    schema: &'s Schema,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    path: Vec<Segment>,
    issues: Vec<String>,
    failure: Option<String>,
}

enum Segment {
    Field(String),
    Key(String),
    Index(usize),
}

impl Context<'_> {
    /// Runs `inner` one step deeper, so that errors inside carry the path.
    fn within<T>(&self, segment: Segment, inner: impl FnOnce() -> T) -> T {
        self.state.borrow_mut().path.push(segment);
        let result = inner();
        self.state.borrow_mut().path.pop();
        result
    }

    fn report(&self, what: &str, name: &str) {
        let mut state = self.state.borrow_mut();
        if state.issues.len() < ISSUES_MAX {
            let path = full_path(&state.path, name);
            state.issues.push(format!("{what} field {path:?}"));
        }
    }

    /// Fails with a message of our own: kept aside, since serde's error types cannot carry it unchanged.
    fn fail<E: de::Error>(&self, message: String) -> E {
        let error = E::custom(&message);
        self.state.borrow_mut().failure.get_or_insert(message);
        error
    }

    fn mismatch<E: de::Error>(&self, found: &str, owner: &str, shape: &Shape) -> E {
        let wanted = go_type(self.schema, shape);
        let path: Vec<String> = self
            .state
            .borrow()
            .path
            .iter()
            .filter_map(|s| if let Segment::Field(name) = s { Some(name.clone()) } else { None })
            .collect();
        let wanted = alias(owner, path.last().map_or("", String::as_str), wanted);
        let target = if path.is_empty() {
            format!("Go value of type {wanted}")
        } else {
            format!("Go struct field {owner}.{} of type {wanted}", path.join("."))
        };
        self.fail(format!("json: cannot unmarshal {found} into {target}"))
    }
}

/// `spec.containers[0].name`: the path with indices, as strict decoding reports it.
fn full_path(path: &[Segment], last: &str) -> String {
    let mut text = String::new();
    for segment in path {
        match segment {
            Segment::Field(name) | Segment::Key(name) => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(name);
            }
            Segment::Index(index) => text.push_str(&format!("[{index}]")),
        }
    }
    if !text.is_empty() {
        text.push('.');
    }
    text.push_str(last);
    text
}

/// Go's own names for strings of few values, by structure and field: its decoder names them in errors.
const ALIASES: &[(&str, &str, &str)] = &[
    ("CSIDriverSpec", "fsGroupPolicy", "v1.FSGroupPolicy"),
    ("CSIDriverSpec", "volumeLifecycleModes", "v1.VolumeLifecycleMode"),
    ("CertificateSigningRequestSpec", "usages", "v1.KeyUsage"),
    ("Container", "imagePullPolicy", "v1.PullPolicy"),
    ("Container", "terminationMessagePolicy", "v1.TerminationMessagePolicy"),
    ("ContainerPort", "protocol", "v1.Protocol"),
    ("CronJobSpec", "concurrencyPolicy", "v1.ConcurrencyPolicy"),
    ("CustomResourceDefinitionSpec", "scope", "v1.ResourceScope"),
    ("DaemonSetUpdateStrategy", "type", "v1.DaemonSetUpdateStrategyType"),
    ("DeploymentStrategy", "type", "v1.DeploymentStrategyType"),
    ("EndpointPort", "protocol", "v1.Protocol"),
    ("HTTPGetAction", "scheme", "v1.URIScheme"),
    ("JobSpec", "completionMode", "v1.CompletionMode"),
    ("LabelSelectorRequirement", "operator", "v1.LabelSelectorOperator"),
    ("LimitRangeItem", "type", "v1.LimitType"),
    ("MetricSpec", "type", "v2.MetricSourceType"),
    ("MetricTarget", "type", "v2.MetricTargetType"),
    ("MutatingWebhook", "failurePolicy", "v1.FailurePolicyType"),
    ("MutatingWebhook", "matchPolicy", "v1.MatchPolicyType"),
    ("MutatingWebhook", "sideEffects", "v1.SideEffectClass"),
    ("NetworkPolicyPort", "protocol", "v1.Protocol"),
    ("NetworkPolicySpec", "policyTypes", "v1.PolicyType"),
    ("NodeSelectorRequirement", "operator", "v1.NodeSelectorOperator"),
    ("PersistentVolumeClaimSpec", "accessModes", "v1.PersistentVolumeAccessMode"),
    ("PersistentVolumeClaimSpec", "volumeMode", "v1.PersistentVolumeMode"),
    ("PersistentVolumeSpec", "accessModes", "v1.PersistentVolumeAccessMode"),
    ("PersistentVolumeSpec", "persistentVolumeReclaimPolicy", "v1.PersistentVolumeReclaimPolicy"),
    ("PersistentVolumeSpec", "volumeMode", "v1.PersistentVolumeMode"),
    ("PodSpec", "dnsPolicy", "v1.DNSPolicy"),
    ("PodSpec", "preemptionPolicy", "v1.PreemptionPolicy"),
    ("PodSpec", "restartPolicy", "v1.RestartPolicy"),
    ("ResourceQuotaSpec", "scopes", "v1.ResourceQuotaScope"),
    ("Secret", "type", "v1.SecretType"),
    ("ServicePort", "protocol", "v1.Protocol"),
    ("ServiceSpec", "externalTrafficPolicy", "v1.ServiceExternalTrafficPolicy"),
    ("ServiceSpec", "internalTrafficPolicy", "v1.ServiceInternalTrafficPolicy"),
    ("ServiceSpec", "ipFamilies", "v1.IPFamily"),
    ("ServiceSpec", "ipFamilyPolicy", "v1.IPFamilyPolicy"),
    ("ServiceSpec", "sessionAffinity", "v1.ServiceAffinity"),
    ("ServiceSpec", "type", "v1.ServiceType"),
    ("StatefulSetSpec", "podManagementPolicy", "v1.PodManagementPolicyType"),
    ("StatefulSetUpdateStrategy", "type", "v1.StatefulSetUpdateStrategyType"),
    ("StorageClass", "reclaimPolicy", "v1.PersistentVolumeReclaimPolicy"),
    ("StorageClass", "volumeBindingMode", "v1.VolumeBindingMode"),
    ("Taint", "effect", "v1.TaintEffect"),
    ("Toleration", "effect", "v1.TaintEffect"),
    ("Toleration", "operator", "v1.TolerationOperator"),
    ("TopologySpreadConstraint", "whenUnsatisfiable", "v1.UnsatisfiableConstraintAction"),
    ("ValidatingWebhook", "failurePolicy", "v1.FailurePolicyType"),
    ("ValidatingWebhook", "matchPolicy", "v1.MatchPolicyType"),
    ("ValidatingWebhook", "sideEffects", "v1.SideEffectClass"),
];

fn alias(owner: &str, field: &str, wanted: String) -> String {
    if wanted == "map[string]resource.Quantity" {
        return "v1.ResourceList".into();
    }
    match ALIASES.iter().find(|(o, f, _)| *o == owner && *f == field) {
        Some((_, _, name)) => wanted.replace("string", name),
        None => wanted,
    }
}

fn go_type(schema: &Schema, shape: &Shape) -> String {
    match shape {
        Shape::Bool => "bool".into(),
        Shape::Int32 => "int32".into(),
        Shape::Int64 => "int64".into(),
        Shape::Double => "float64".into(),
        Shape::String | Shape::Time | Shape::MicroTime => "string".into(),
        Shape::Bytes => "[]uint8".into(),
        Shape::Quantity => "resource.Quantity".into(),
        Shape::IntOrString => "intstr.IntOrString".into(),
        Shape::Any => "runtime.RawExtension".into(),
        Shape::Object(id) => {
            let full = &schema.type_of(*id).full;
            full.split_once('.').map_or(full.clone(), |(_, rest)| rest.to_owned())
        }
        Shape::List(inner) => format!("[]{}", go_type(schema, inner)),
        Shape::Map(inner) => format!("map[string]{}", go_type(schema, inner)),
    }
}

/// Decodes one value of a shape; `None` is a JSON null, which Go treats as absent.
struct Seed<'a, 's> {
    context: &'a Context<'s>,
    shape: &'a Shape,
    /// The structure whose field this is, for error messages.
    owner: &'a str,
}

impl<'de> DeserializeSeed<'de> for Seed<'_, '_> {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Self::Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'a, 's> Seed<'a, 's> {
    fn child(&self, shape: &'a Shape, owner: &'a str) -> Seed<'a, 's> {
        Seed { context: self.context, shape, owner }
    }

    fn integer<E: de::Error>(&self, number: i64) -> Result<Option<Value>, E> {
        let fits = match self.shape {
            Shape::Int32 => i32::try_from(number).is_ok(),
            Shape::IntOrString => i32::try_from(number).is_ok(),
            Shape::Int64 | Shape::Double | Shape::Any => true,
            Shape::Quantity => return self.string(&number.to_string()),
            _ => return Err(self.context.mismatch("number", self.owner, self.shape)),
        };
        if !fits {
            let shape = if *self.shape == Shape::IntOrString { &Shape::Int32 } else { self.shape };
            return Err(self.context.mismatch(&format!("number {number}"), self.owner, shape));
        }
        Ok(Some(number.into()))
    }

    fn string<E: de::Error>(&self, text: &str) -> Result<Option<Value>, E> {
        let canonical = match self.shape {
            Shape::String | Shape::Any | Shape::IntOrString => text.to_owned(),
            Shape::Quantity => match text.parse::<Quantity>() {
                Ok(quantity) => quantity.to_string(),
                Err(_) => return Err(self.context.fail(quantity::FORMAT_ERROR.into())),
            },
            Shape::Bytes => match check_base64(text) {
                Ok(()) => text.to_owned(),
                Err(at) => {
                    return Err(self.context.fail(format!("illegal base64 data at input byte {at}")));
                }
            },
            Shape::Time => self.time(text, 0)?,
            Shape::MicroTime => self.time(text, 6)?,
            _ => return Err(self.context.mismatch("string", self.owner, self.shape)),
        };
        Ok(Some(Value::String(canonical)))
    }

    /// Times are kept in UTC, as upstream prints them.
    fn time<E: de::Error>(&self, text: &str, digits: u8) -> Result<String, E> {
        match text.parse::<jiff::Timestamp>() {
            Ok(time) => Ok(crate::time::print(time, digits)),
            Err(_) => {
                let form = if digits == 6 {
                    "2006-01-02T15:04:05.000000Z07:00"
                } else {
                    "2006-01-02T15:04:05Z07:00"
                };
                let why = format!("parsing time {text:?} as {form:?}: cannot parse {text:?} as \"2006\"");
                Err(self.context.fail(why))
            }
        }
    }
}

impl<'de> Visitor<'de> for Seed<'_, '_> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "a value for {}", self.owner)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Self::Value, E> {
        match self.shape {
            Shape::Bool | Shape::Any => Ok(Some(value.into())),
            _ => Err(self.context.mismatch("bool", self.owner, self.shape)),
        }
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
        self.integer(number)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
        match i64::try_from(number) {
            Ok(number) => self.integer(number),
            Err(_) if *self.shape == Shape::Any => Ok(Some(number.into())),
            Err(_) => Err(self.context.mismatch(&format!("number {number}"), self.owner, self.shape)),
        }
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Self::Value, E> {
        match self.shape {
            Shape::Double | Shape::Any => Ok(Number::from_f64(number).map(Value::Number)),
            Shape::Quantity => self.string(&number.to_string()),
            Shape::Int32 | Shape::Int64 | Shape::IntOrString => {
                Err(self.context.mismatch(&format!("number {number}"), self.owner, self.shape))
            }
            _ => Err(self.context.mismatch("number", self.owner, self.shape)),
        }
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        self.string(text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let inner = match self.shape {
            Shape::List(inner) => inner.as_ref(),
            Shape::Any => &Shape::Any,
            _ => return Err(self.context.mismatch("array", self.owner, self.shape)),
        };
        let mut list = Vec::new();
        while let Some(item) = self
            .context
            .within(Segment::Index(list.len()), || items.next_element_seed(self.child(inner, self.owner)))?
        {
            list.push(item.unwrap_or_else(|| zero(inner)));
        }
        Ok(Some(Value::Array(list)))
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<Self::Value, A::Error> {
        match self.shape {
            Shape::Object(id) => self.object(*id, entries),
            Shape::Map(inner) => self.map(inner, entries),
            Shape::Any => self.map(&Shape::Any, entries),
            _ => Err(self.context.mismatch("object", self.owner, self.shape)),
        }
    }
}

impl<'a> Seed<'a, '_> {
    fn object<'de, A: MapAccess<'de>>(self, id: TypeId, mut entries: A) -> Result<Option<Value>, A::Error> {
        let structure = self.context.schema.type_of(id);
        let mut map = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            let Some(field) = structure.field(&name) else {
                self.context.report("unknown", &name);
                entries.next_value::<IgnoredAny>()?;
                continue;
            };
            let value = self.context.within(Segment::Field(name.clone()), || {
                entries.next_value_seed(self.child(&field.shape, &structure.name))
            })?;
            if map.contains_key(&name) {
                self.context.report("duplicate", &name);
            }
            match value.filter(|v| !is_dropped(field, v)) {
                Some(value) => map.insert(name, value),
                None => map.remove(&name),
            };
        }
        Ok(Some(Value::Object(map)))
    }

    fn map<'de, A: MapAccess<'de>>(
        self,
        inner: &'a Shape,
        mut entries: A,
    ) -> Result<Option<Value>, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = self.context.within(Segment::Key(key.clone()), || {
                entries.next_value_seed(self.child(inner, self.owner))
            })?;
            if map.contains_key(&key) {
                self.context.report("duplicate", &key);
            }
            let value = value.unwrap_or_else(|| zero(inner));
            map.insert(key, value);
        }
        Ok(Some(Value::Object(map)))
    }
}

/// Empty optional lists and maps are not kept: Go's encoder omits them, so clients never see them.
fn is_dropped(field: &Field, value: &Value) -> bool {
    if field.required {
        return false;
    }
    match (&field.shape, value) {
        (Shape::List(_), Value::Array(items)) => items.is_empty(),
        (Shape::Map(_), Value::Object(map)) => map.is_empty(),
        _ => false,
    }
}

/// What Go has for a null inside a list or map.
pub(crate) fn zero(shape: &Shape) -> Value {
    match shape {
        Shape::Bool => false.into(),
        Shape::Int32 | Shape::Int64 | Shape::Double | Shape::IntOrString => 0.into(),
        Shape::String | Shape::Bytes => "".into(),
        Shape::Quantity => "0".into(),
        Shape::Object(_) => Value::Object(Map::new()),
        Shape::Time | Shape::MicroTime | Shape::Any | Shape::List(_) | Shape::Map(_) => Value::Null,
    }
}

/// Standard base64 with padding; the error is the offset of the first bad byte.
fn check_base64(text: &str) -> Result<(), usize> {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    match STANDARD.decode(text) {
        Ok(_) => Ok(()),
        Err(base64::DecodeError::InvalidByte(at, _)) => Err(at),
        Err(base64::DecodeError::InvalidLastSymbol(at, _)) => Err(at),
        // Go reports where the last incomplete group of four starts.
        Err(_) => Err(text.len() / 4 * 4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(text: &str) -> Result<Decoded, DecodeError> {
        let schema = Schema::builtin();
        json(schema, schema.resource("", "v1", "pods").expect("served").type_id, text.as_bytes())
    }

    #[test]
    fn unknown_and_duplicate_fields_are_dropped_and_named() {
        let decoded = pod(r#"{"kind":"Pod","spec":{"x":1,"containers":[{"name":"a","y":{},"name":"b"}]}}"#)
            .expect("decodes");
        assert_eq!(decoded.value, json!({"kind":"Pod","spec":{"containers":[{"name":"b"}]}}));
        assert_eq!(
            decoded.issues,
            [
                r#"unknown field "spec.x""#,
                r#"unknown field "spec.containers[0].y""#,
                r#"duplicate field "spec.containers[0].name""#
            ]
        );
    }

    #[test]
    fn type_errors_are_worded_as_go_does() {
        for (text, message) in [
            (
                r#"{"spec":{"containers":[{"ports":[{"containerPort":"x"}]}]}}"#,
                "json: cannot unmarshal string into Go struct field ContainerPort.spec.containers.ports.containerPort of type int32",
            ),
            (
                r#"{"spec":{"containers":["x"]}}"#,
                "json: cannot unmarshal string into Go struct field PodSpec.spec.containers of type v1.Container",
            ),
            (
                r#"{"metadata":{"labels":"x"}}"#,
                "json: cannot unmarshal string into Go struct field ObjectMeta.metadata.labels of type map[string]string",
            ),
            (
                r#"{"spec":{"priority":1099511627776}}"#,
                "json: cannot unmarshal number 1099511627776 into Go struct field PodSpec.spec.priority of type int32",
            ),
            (r#"{"spec""#, "unexpected end of JSON input"),
        ] {
            assert_eq!(pod(text).expect_err(text).0, message);
        }
    }

    #[test]
    fn leaves_are_canonical_and_nulls_absent() {
        let decoded = pod(
            r#"{"metadata":{"creationTimestamp":null,"labels":{},"deletionTimestamp":"2024-01-02T03:04:05+01:00"},
                "spec":{"containers":[{"name":"a","resources":{"limits":{"cpu":"1000m","memory":1024}}}]}}"#,
        )
        .expect("decodes");
        assert_eq!(
            decoded.value,
            json!({"metadata":{"deletionTimestamp":"2024-01-02T02:04:05Z"},
                "spec":{"containers":[{"name":"a","resources":{"limits":{"cpu":"1","memory":"1024"}}}]}})
        );
    }

    #[test]
    fn nesting_bombs_are_refused() {
        let bomb = format!("{}{}", r#"{"metadata":"#.repeat(10_000), "}".repeat(10_000));
        assert!(pod(&bomb).is_err());
    }
}
