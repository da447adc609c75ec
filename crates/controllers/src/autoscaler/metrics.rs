//! Reading metrics: `metrics.k8s.io`, `custom.metrics.k8s.io` and `external.metrics.k8s.io`, each as whoever serves it
//! answers. Errors are worded as upstream's client words them, because they end up in conditions and events.

use super::calculator::{Sample, Samples, millis};
use super::target::Mapped;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::Client;
use serde_json::Value;

const RESOURCE_API: &str = "metrics.k8s.io";
const CUSTOM_API: &str = "custom.metrics.k8s.io";
const EXTERNAL_API: &str = "external.metrics.k8s.io";
/// The window of a measurement that does not say its own. Upstream's value.
const WINDOW_DEFAULT: SignedDuration = SignedDuration::from_secs(60);

/// What the pods of `selector` use of a resource, or one container of each. A pod of which a container has no value is
/// left out.
pub async fn of_resource(
    client: &Client,
    namespace: &str,
    selector: &str,
    resource: &str,
    container: Option<&str>,
) -> Result<Samples, String> {
    let path = format!("/apis/{RESOURCE_API}/v1beta1/namespaces/{namespace}/pods");
    let list = get(client, &path, &[("labelSelector", selector)], "pods.metrics.k8s.io").await;
    let list = list.map_err(|error| format!("unable to fetch metrics from resource metrics API: {error}"))?;
    let items = items(&list).ok_or("no metrics returned from resource metrics API")?;
    let mut samples = Samples::new();
    for item in items {
        let name = text(&item["metadata"]["name"]);
        let containers = item["containers"].as_array().map(Vec::as_slice).unwrap_or_default();
        let usage = |one: &Value| one["usage"][resource].as_str().map(millis);
        let value = match container {
            None if containers.is_empty() => None,
            None => containers.iter().map(usage).sum::<Option<i64>>(),
            Some(wanted) => {
                let one = containers.iter().find(|one| one["name"] == wanted);
                let one = one.ok_or_else(|| {
                    format!("container {wanted} not present in metrics for pod {namespace}/{name}")
                })?;
                usage(one)
            }
        };
        let window = item["window"].as_str().and_then(|text| text.parse().ok()).unwrap_or(WINDOW_DEFAULT);
        if let Some(value) = value {
            samples.insert(name, Sample { value, at: time(&item["timestamp"]), window });
        }
    }
    Ok(samples)
}

/// A metric of each pod of `selector`.
pub async fn of_pods(
    client: &Client,
    namespace: &str,
    selector: &str,
    metric: &str,
    metric_selector: &str,
) -> Result<Samples, String> {
    let path = format!("namespaces/{namespace}/pods/*/{metric}");
    let list = custom(client, &path, metric, selector, metric_selector).await?;
    let items = items(&list).ok_or_else(no_custom_metrics)?;
    let sample = |item: &Value| Sample {
        value: value(item),
        at: time(&item["timestamp"]),
        window: item["windowSeconds"].as_i64().map_or(WINDOW_DEFAULT, SignedDuration::from_secs),
    };
    Ok(items.iter().map(|item| (text(&item["describedObject"]["name"]), sample(item))).collect())
}

/// A metric of one object.
pub async fn of_object(
    client: &Client,
    namespace: &str,
    resource: &Mapped,
    name: &str,
    metric: &str,
    metric_selector: &str,
) -> Result<i64, String> {
    let (group, plural) = (&resource.kind.group, &resource.kind.plural);
    let plural = if group.is_empty() { plural.clone() } else { format!("{plural}.{group}") };
    let path = match resource.namespaced {
        _ if plural == "namespaces" => format!("namespaces/{name}/metrics/{metric}"),
        true => format!("namespaces/{namespace}/{plural}/{name}/{metric}"),
        false => format!("{plural}/{name}/{metric}"),
    };
    let list = custom(client, &path, metric, "", metric_selector).await?;
    let first = items(&list).and_then(|items| items.first());
    first.map(value).ok_or_else(no_custom_metrics)
}

fn no_custom_metrics() -> String {
    "no metrics returned from custom metrics API".to_owned()
}

/// All values of an external metric.
pub async fn of_outside(
    client: &Client,
    namespace: &str,
    metric: &str,
    selector: &str,
) -> Result<Vec<i64>, String> {
    let path = format!("/apis/{EXTERNAL_API}/v1beta1/namespaces/{namespace}/{metric}");
    let what = format!("{metric}.{EXTERNAL_API}");
    let list = get(client, &path, &[("labelSelector", selector)], &what).await;
    let list = list.map_err(|error| format!("unable to fetch metrics from external metrics API: {error}"))?;
    let items = items(&list).ok_or("no metrics returned from external metrics API")?;
    Ok(items.iter().map(value).collect())
}

/// Asks the newest version of the custom metrics API there is.
async fn custom(
    client: &Client,
    path: &str,
    metric: &str,
    selector: &str,
    metric_selector: &str,
) -> Result<Value, String> {
    let failed = |error: String| format!("unable to fetch metrics from custom metrics API: {error}");
    let group = get(client, &format!("/apis/{CUSTOM_API}"), &[], CUSTOM_API).await;
    let versions = group.map(|group| group["versions"].clone()).unwrap_or_default();
    let serves = |version: &&str| {
        versions.as_array().is_some_and(|all| all.iter().any(|one| one["version"] == *version))
    };
    let version = ["v1beta2", "v1beta1"].into_iter().find(serves);
    let version =
        version.ok_or_else(|| failed(format!("no custom metrics API ({CUSTOM_API}) registered")))?;
    let query = [("labelSelector", selector), ("metricLabelSelector", metric_selector)];
    let path = format!("/apis/{CUSTOM_API}/{version}/{path}");
    get(client, &path, &query, &format!("{metric}.{CUSTOM_API}")).await.map_err(failed)
}

async fn get(client: &Client, path: &str, query: &[(&str, &str)], what: &str) -> Result<Value, String> {
    let query = encoded(query);
    let uri = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
    let request = http::Request::get(uri).body(Vec::new()).map_err(|error| error.to_string())?;
    client.request::<Value>(request).await.map_err(|error| match error {
        kube::Error::Api(status) if status.code == 404 => {
            format!("the server could not find the requested resource (get {what})")
        }
        kube::Error::Api(status) if status.code == 503 => {
            format!("the server is currently unable to handle the request (get {what})")
        }
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    })
}

fn encoded(query: &[(&str, &str)]) -> String {
    let given = query.iter().filter(|(_, value)| !value.is_empty());
    form_urlencoded::Serializer::new(String::new()).extend_pairs(given).finish()
}

/// The items of a list, if there are any.
fn items(list: &Value) -> Option<&Vec<Value>> {
    list["items"].as_array().filter(|items| !items.is_empty())
}

fn value(item: &Value) -> i64 {
    item["value"].as_str().map_or(0, millis)
}

fn time(value: &Value) -> Timestamp {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A selector as a query writes it.
pub fn query_form(selector: Option<&LabelSelector>) -> String {
    let Some(selector) = selector else { return String::new() };
    let labels = selector.match_labels.iter().flatten();
    let mut terms: Vec<String> = labels.map(|(key, value)| format!("{key}={value}")).collect();
    for item in selector.match_expressions.iter().flatten() {
        let (key, values) = (&item.key, item.values.clone().unwrap_or_default().join(","));
        terms.push(match item.operator.as_str() {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "DoesNotExist" => format!("!{key}"),
            _ => key.clone(),
        });
    }
    terms.sort();
    terms.join(",")
}

/// A selector as upstream's messages show it.
pub fn shown(selector: Option<&LabelSelector>) -> String {
    let Some(selector) = selector else { return "nil".to_owned() };
    let labels: String =
        selector.match_labels.iter().flatten().map(|(key, value)| format!("{key}: {value},")).collect();
    let expressions: String = selector
        .match_expressions
        .iter()
        .flatten()
        .map(|item| {
            let values = item.values.clone().unwrap_or_default().join(" ");
            format!(
                "LabelSelectorRequirement{{Key:{},Operator:{},Values:[{values}],}},",
                item.key, item.operator
            )
        })
        .collect();
    format!(
        "&LabelSelector{{MatchLabels:map[string]string{{{labels}}},MatchExpressions:[]LabelSelectorRequirement{{{expressions}}},}}"
    )
}
