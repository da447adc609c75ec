//! Label selectors, evaluated: the `LabelSelector` of workload objects and the plain map of Services.

use crate::{Error, Result};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use std::collections::BTreeMap;

/// Labels as objects carry them.
pub type Labels = BTreeMap<String, String>;

/// A checked selector. An empty one matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Selector {
    equal: Labels,
    requirements: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Requirement {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl Selector {
    /// Checks `selector`; an unknown operator or a wrong number of values is an error no retry can heal.
    pub fn new(selector: &LabelSelector) -> Result<Self> {
        let requirements =
            selector.match_expressions.iter().flatten().map(requirement).collect::<Result<Vec<_>>>()?;
        Ok(Selector { equal: selector.match_labels.clone().unwrap_or_default(), requirements })
    }

    /// A selector of equalities.
    pub fn equal(labels: &Labels) -> Self {
        Selector { equal: labels.clone(), requirements: Vec::new() }
    }

    /// A selector that matches nothing: what an absent `LabelSelector` means to most APIs.
    pub fn none() -> Self {
        let nothing = Requirement { key: String::new(), operator: Operator::In, values: Vec::new() };
        Selector { equal: Labels::new(), requirements: vec![nothing] }
    }

    pub fn is_empty(&self) -> bool {
        self.equal.is_empty() && self.requirements.is_empty()
    }

    pub fn matches(&self, labels: Option<&Labels>) -> bool {
        let value = |key: &str| labels.and_then(|labels| labels.get(key));
        self.equal.iter().all(|(key, wanted)| value(key) == Some(wanted))
            && self.requirements.iter().all(|requirement| {
                let value = value(&requirement.key);
                let listed = value.is_some_and(|value| requirement.values.contains(value));
                match requirement.operator {
                    Operator::In => listed,
                    Operator::NotIn => !listed,
                    Operator::Exists => value.is_some(),
                    Operator::DoesNotExist => value.is_none(),
                }
            })
    }
}

fn requirement(requirement: &LabelSelectorRequirement) -> Result<Requirement> {
    let values = requirement.values.clone().unwrap_or_default();
    let refuse = |reason: String| Err(Error::terminal("read label selector", reason));
    let operator = match requirement.operator.as_str() {
        "In" => Operator::In,
        "NotIn" => Operator::NotIn,
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        other => return refuse(format!("{other:?} is not a valid label selector operator")),
    };
    match operator {
        Operator::In | Operator::NotIn if values.is_empty() => refuse(
            "values: Invalid value: []: for 'in', 'notin' operators, values set can't be empty".to_owned(),
        ),
        _ => Ok(Requirement { key: requirement.key.clone(), operator, values }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn selectors_match_as_upstream() {
        let labels: Labels = [("app".to_owned(), "web".to_owned())].into();
        let cases = [
            (json!({}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "db"}}), false),
            (json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web", "db"]}]}), true),
            (json!({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["x"]}]}), true),
            (json!({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}), false),
        ];
        for (selector, expected) in cases {
            let parsed = Selector::new(&serde_json::from_value(selector.clone()).unwrap()).unwrap();
            assert_eq!(parsed.matches(Some(&labels)), expected, "{selector}");
        }
    }
}
