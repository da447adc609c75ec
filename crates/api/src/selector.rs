//! Label and field selectors: parsing as upstream words it, and matching.

use serde_json::{Map, Value};

use crate::object::Object;

/// A conjunction of requirements; the empty selector matches everything.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
    /// A nil selector of an object matches nothing.
    nothing: bool,
}

/// One requirement on one label.
#[derive(Debug, Clone, PartialEq)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
    pub values: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    GreaterThan,
    LessThan,
}

/// Why a selector cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(pub String);

impl LabelSelector {
    /// Parses the query form: `a=b,c in (d,e),!f`.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut parser = Parser { rest: text.trim() };
        let mut requirements = Vec::new();
        if parser.rest.is_empty() {
            return Ok(LabelSelector::default());
        }
        loop {
            requirements.push(parser.requirement()?);
            match parser.token() {
                "" => break,
                "," => {}
                other => {
                    return Err(ParseError(format!(
                        "unable to parse requirement: found '{other}', expected: ',' or 'end of string'"
                    )));
                }
            }
        }
        Ok(LabelSelector { requirements, nothing: false })
    }

    /// Reads the object form, `metav1.LabelSelector`; nothing there selects nothing.
    pub fn from_value(selector: Option<&Value>) -> Self {
        let Some(selector) = selector else {
            return LabelSelector { requirements: Vec::new(), nothing: true };
        };
        let mut requirements = Self::from_labels(selector.get("matchLabels")).requirements;
        for item in selector.list_at("matchExpressions") {
            let operator = match item.str_at("operator") {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                _ => Operator::DoesNotExist,
            };
            let values =
                item.list_at("values").iter().filter_map(|v| v.as_str().map(str::to_owned)).collect();
            requirements.push(Requirement { key: item.str_at("key").to_owned(), operator, values });
        }
        LabelSelector { requirements, nothing: false }
    }

    /// Reads a plain map of labels, all of which must be there.
    pub fn from_labels(labels: Option<&Value>) -> Self {
        let entries = labels.and_then(Value::as_object).into_iter().flatten();
        let requirements = entries
            .map(|(key, value)| Requirement {
                key: key.clone(),
                operator: Operator::In,
                values: vec![value.as_str().unwrap_or_default().to_owned()],
            })
            .collect();
        LabelSelector { requirements, nothing: false }
    }

    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty() && !self.nothing
    }

    pub fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }

    pub fn matches(&self, labels: Option<&Map<String, Value>>) -> bool {
        !self.nothing && self.requirements.iter().all(|r| r.matches(labels))
    }
}

impl Requirement {
    fn matches(&self, labels: Option<&Map<String, Value>>) -> bool {
        let value = labels.and_then(|l| l.get(&self.key)).and_then(Value::as_str);
        let number = |text: &str| text.parse::<i64>().ok();
        let compares = |by: fn(&i64, &i64) -> bool| {
            let wanted = self.values.first().and_then(|v| number(v));
            value.and_then(number).zip(wanted).is_some_and(|(have, wanted)| by(&have, &wanted))
        };
        match self.operator {
            Operator::In => value.is_some_and(|v| self.values.iter().any(|w| w == v)),
            Operator::NotIn => value.is_none_or(|v| self.values.iter().all(|w| w != v)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::GreaterThan => compares(i64::gt),
            Operator::LessThan => compares(i64::lt),
        }
    }
}

/// A tiny tokenizer: punctuation one by one, words up to the next punctuation or blank.
struct Parser<'t> {
    rest: &'t str,
}

impl<'t> Parser<'t> {
    fn token(&mut self) -> &'t str {
        let (token, rest) = Self::split(self.rest.trim_start());
        self.rest = rest;
        token
    }

    fn peek(&self) -> &'t str {
        Self::split(self.rest.trim_start()).0
    }

    fn split(text: &'t str) -> (&'t str, &'t str) {
        for symbol in ["==", "!=", "=", "!", ",", "(", ")", ">", "<"] {
            if text.starts_with(symbol) {
                return text.split_at(symbol.len());
            }
        }
        let end = text.find(|c: char| c.is_whitespace() || "=!,()<>".contains(c)).unwrap_or(text.len());
        text.split_at(end)
    }

    fn word(&mut self, expected: &str) -> Result<&'t str, ParseError> {
        let token = self.token();
        if token.is_empty() || token.chars().all(|c| "=!,()<>".contains(c)) {
            return Err(ParseError(format!(
                "unable to parse requirement: found '{token}', expected: {expected}"
            )));
        }
        Ok(token)
    }

    fn requirement(&mut self) -> Result<Requirement, ParseError> {
        let negated = self.peek() == "!";
        if negated {
            self.token();
        }
        let key = self.word("identifier")?.to_owned();
        check_key(&key)?;
        let make = |operator, values| Requirement { key: key.clone(), operator, values };
        if negated {
            return Ok(make(Operator::DoesNotExist, Vec::new()));
        }
        let requirement = match self.peek() {
            "" | "," => return Ok(make(Operator::Exists, Vec::new())),
            "=" | "==" => {
                self.token();
                make(Operator::In, vec![self.value()])
            }
            "!=" => {
                self.token();
                make(Operator::NotIn, vec![self.value()])
            }
            "in" => {
                self.token();
                make(Operator::In, self.values()?)
            }
            "notin" => {
                self.token();
                make(Operator::NotIn, self.values()?)
            }
            symbol @ (">" | "<") => {
                self.token();
                let operator = if symbol == ">" { Operator::GreaterThan } else { Operator::LessThan };
                make(operator, vec![self.word("identifier")?.to_owned()])
            }
            other => {
                return Err(ParseError(format!(
                    "unable to parse requirement: found '{other}', expected: in, notin, =, ==, !=, gt, lt"
                )));
            }
        };
        requirement.values.iter().try_for_each(|v| check_value(&key, v))?;
        Ok(requirement)
    }

    /// The value after `=`: may be empty.
    fn value(&mut self) -> String {
        if matches!(self.peek(), "" | ",") { String::new() } else { self.token().to_owned() }
    }

    fn values(&mut self) -> Result<Vec<String>, ParseError> {
        let open = self.token();
        if open != "(" {
            return Err(ParseError(format!("unable to parse requirement: found '{open}', expected: '('")));
        }
        let mut values = Vec::new();
        loop {
            match self.token() {
                ")" => break,
                "," => {}
                "" => {
                    return Err(ParseError(
                        "unable to parse requirement: found '', expected: ',' or ')'".into(),
                    ));
                }
                word => values.push(word.to_owned()),
            }
        }
        Ok(values)
    }
}

fn check_key(key: &str) -> Result<(), ParseError> {
    let problems = crate::names::qualified_name(key);
    if problems.is_empty() {
        return Ok(());
    }
    Err(ParseError(format!(
        "unable to parse requirement: <nil>: Invalid value: {key:?}: {}",
        problems.join("; ")
    )))
}

fn check_value(key: &str, value: &str) -> Result<(), ParseError> {
    let problems = crate::names::label_value(value);
    if problems.is_empty() {
        return Ok(());
    }
    let text = problems.join("; ");
    Err(ParseError(format!(
        "unable to parse requirement: values[0][{key}]: Invalid value: {value:?}: {text}"
    )))
}

/// `metadata.name=x,status.phase!=Running`: equality on the kind's selectable fields.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FieldSelector {
    pub terms: Vec<FieldTerm>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct FieldTerm {
    pub field: String,
    pub value: String,
    pub equal: bool,
}

impl FieldSelector {
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut terms = Vec::new();
        for part in text.split(',').filter(|p| !p.is_empty()) {
            let (field, value, equal) = match (part.split_once("!="), part.split_once("==")) {
                (Some((f, v)), _) => (f, v, false),
                (_, Some((f, v))) => (f, v, true),
                _ => match part.split_once('=') {
                    Some((f, v)) => (f, v, true),
                    None => {
                        return Err(ParseError(format!(
                            "invalid selector: '{text}'; can't understand '{part}'"
                        )));
                    }
                },
            };
            terms.push(FieldTerm { field: field.to_owned(), value: value.to_owned(), equal });
        }
        Ok(FieldSelector { terms })
    }

    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }

    /// The value that `field` must have, if the selector pins it.
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.terms.iter().find(|t| t.equal && t.field == field).map(|t| t.value.as_str())
    }

    /// Matches by reading each field with `read`.
    pub fn matches<'a>(&self, read: impl Fn(&str) -> std::borrow::Cow<'a, str>) -> bool {
        self.terms.iter().all(|t| (read(&t.field) == t.value) == t.equal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn query_selectors_match_as_kubernetes_has_them() {
        let labels = json!({"app":"web","tier":"front","n":"5"});
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier=front", true),
            ("app!=web", false),
            ("app in (db, web)", true),
            ("app notin (db)", true),
            ("missing notin (x)", true),
            ("app", true),
            ("!app", false),
            ("!missing", true),
            ("n>4", true),
            ("n<4", false),
            ("missing!=x", true),
            ("app=", false),
        ] {
            let selector = LabelSelector::parse(text).expect(text);
            assert_eq!(selector.matches(labels.as_object()), expected, "{text}");
        }
    }

    #[test]
    fn broken_selectors_are_explained() {
        assert_eq!(
            LabelSelector::parse("a in (b").expect_err("open list").0,
            "unable to parse requirement: found '', expected: ',' or ')'"
        );
        assert!(LabelSelector::parse("a b").is_err());
        assert!(LabelSelector::parse("=x").is_err());
    }

    #[test]
    fn object_selectors_match_nothing_when_absent_and_all_when_empty() {
        assert!(!LabelSelector::from_value(None).matches(None));
        assert!(LabelSelector::from_value(Some(&json!({}))).matches(None));
    }
}
