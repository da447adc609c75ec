//! JSONPath in kubectl's dialect: templates with `{...}`, `range`/`end`, filters, unions, slices, descent.
//!
//! Follows `k8s.io/client-go/util/jsonpath`: what is missing prints nothing, several results are joined by a
//! space, objects and lists print as JSON.

use std::cmp::Ordering;

use serde_json::Value;

/// A parsed template.
#[derive(Debug, PartialEq)]
pub struct Template(Vec<Part>);

#[derive(Debug, PartialEq)]
enum Part {
    Text(String),
    Path(Vec<Step>),
    Range(Vec<Step>, Vec<Part>),
}

#[derive(Debug, PartialEq)]
enum Step {
    Root,
    Field(String),
    Wildcard,
    /// `..`: the value and everything in it.
    Descend,
    Slice(Option<i64>, Option<i64>, i64),
    Index(i64),
    Union(Vec<Step>),
    Filter(Operand, Option<(Operator, Operand)>),
}

#[derive(Debug, PartialEq)]
enum Operand {
    Path(Vec<Step>),
    Literal(Value),
}

#[derive(Debug, PartialEq, Clone, Copy)]
enum Operator {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

impl Template {
    /// Parses a template, or says what is wrong with it.
    pub fn parse(text: &str) -> Result<Template, String> {
        let mut parser = Parser { text: text.chars().collect(), at: 0 };
        let parts = parser.parts(false)?;
        Ok(Template(parts))
    }

    /// A single expression, with braces and the leading dot optional: `--sort-by`, custom columns.
    pub fn relaxed(text: &str) -> Result<Template, String> {
        let inner = text.trim();
        let inner = inner.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(inner);
        let dot = if inner.starts_with(['.', '[', '$', '@']) { "" } else { "." };
        Template::parse(&format!("{{{dot}{inner}}}"))
    }

    /// The text the template makes of the value.
    pub fn render(&self, root: &Value) -> String {
        let mut out = String::new();
        render(&self.0, root, root, &mut out);
        out
    }

    /// All values the template's expressions find.
    pub fn find<'v>(&self, root: &'v Value) -> Vec<&'v Value> {
        let paths = self.0.iter().filter_map(|p| if let Part::Path(steps) = p { Some(steps) } else { None });
        paths.flat_map(|steps| walk(steps, root, root)).collect()
    }
}

fn render(parts: &[Part], root: &Value, here: &Value, out: &mut String) {
    for part in parts {
        match part {
            Part::Text(text) => out.push_str(text),
            Part::Path(steps) => {
                let found: Vec<String> = walk(steps, root, here).into_iter().map(print).collect();
                out.push_str(&found.join(" "));
            }
            Part::Range(steps, body) => {
                for item in walk(steps, root, here) {
                    render(body, root, item, out);
                }
            }
        }
    }
}

/// A value as a template prints it.
pub fn print(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn walk<'v>(steps: &[Step], root: &'v Value, here: &'v Value) -> Vec<&'v Value> {
    let mut values = vec![here];
    for step in steps {
        values = values.into_iter().flat_map(|value| take(step, root, value)).collect();
    }
    values
}

fn take<'v>(step: &Step, root: &'v Value, value: &'v Value) -> Vec<&'v Value> {
    match step {
        Step::Root => vec![root],
        Step::Field(name) => value.get(name).into_iter().collect(),
        Step::Wildcard => children(value),
        Step::Descend => descend(value),
        Step::Index(index) => {
            let Value::Array(items) = value else { return Vec::new() };
            let index = if *index < 0 { index + items.len() as i64 } else { *index };
            usize::try_from(index).ok().and_then(|i| items.get(i)).into_iter().collect()
        }
        Step::Slice(start, end, step) => slice(value, *start, *end, *step),
        Step::Union(steps) => steps.iter().flat_map(|step| take(step, root, value)).collect(),
        Step::Filter(left, test) => {
            let Value::Array(items) = value else { return Vec::new() };
            items.iter().filter(|item| passes(left, test.as_ref(), root, item)).collect()
        }
    }
}

fn children(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(items) => items.iter().collect(),
        Value::Object(map) => map.values().collect(),
        _ => Vec::new(),
    }
}

fn descend(value: &Value) -> Vec<&Value> {
    let mut all = vec![value];
    for child in children(value) {
        all.extend(descend(child));
    }
    all
}

fn slice(value: &Value, start: Option<i64>, end: Option<i64>, step: i64) -> Vec<&Value> {
    let Value::Array(items) = value else { return Vec::new() };
    let count = items.len() as i64;
    let bound = |at: i64| (if at < 0 { at + count } else { at }).clamp(0, count) as usize;
    let (start, end) = (bound(start.unwrap_or(0)), bound(end.unwrap_or(count)));
    if start >= end {
        return Vec::new();
    }
    items[start..end].iter().step_by(usize::try_from(step).unwrap_or(1).max(1)).collect()
}

fn passes(left: &Operand, test: Option<&(Operator, Operand)>, root: &Value, item: &Value) -> bool {
    let value = |operand: &Operand| match operand {
        Operand::Literal(value) => Some(value.clone()),
        Operand::Path(steps) => walk(steps, root, item).into_iter().next().cloned(),
    };
    match (value(left), test) {
        (found, None) => found.is_some(),
        (Some(left), Some((operator, right))) => {
            value(right).is_some_and(|right| compare(&left, *operator, &right))
        }
        (None, Some(_)) => false,
    }
}

fn compare(left: &Value, operator: Operator, right: &Value) -> bool {
    let order = order(left, right);
    match operator {
        Operator::Equal => order == Some(Ordering::Equal),
        Operator::NotEqual => order != Some(Ordering::Equal),
        Operator::Less => order == Some(Ordering::Less),
        Operator::LessEqual => matches!(order, Some(Ordering::Less | Ordering::Equal)),
        Operator::Greater => order == Some(Ordering::Greater),
        Operator::GreaterEqual => matches!(order, Some(Ordering::Greater | Ordering::Equal)),
    }
}

fn order(left: &Value, right: &Value) -> Option<Ordering> {
    match (left, right) {
        (Value::Number(a), Value::Number(b)) => a.as_f64()?.partial_cmp(&b.as_f64()?),
        (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
        (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
        (a, b) => (a == b).then_some(Ordering::Equal),
    }
}

struct Parser {
    text: Vec<char>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.text.get(self.at).copied()
    }

    fn eat(&mut self, expected: &str) -> bool {
        let found = expected.chars().enumerate().all(|(i, c)| self.text.get(self.at + i) == Some(&c));
        if found {
            self.at += expected.chars().count();
        }
        found
    }

    fn skip_spaces(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.at += 1;
        }
    }

    /// Parts up to the end of the text, or to `{end}` inside a range.
    fn parts(&mut self, in_range: bool) -> Result<Vec<Part>, String> {
        let mut parts = Vec::new();
        let mut text = String::new();
        while let Some(c) = self.peek() {
            self.at += 1;
            if c != '{' {
                text.push(c);
                continue;
            }
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text)));
            }
            if self.action(&mut parts)? {
                return if in_range { Ok(parts) } else { Err("not in range, nothing to end".into()) };
            }
        }
        if in_range {
            return Err("unterminated range: {end} is missing".into());
        }
        if !text.is_empty() {
            parts.push(Part::Text(text));
        }
        Ok(parts)
    }

    /// What stands between braces. True if it is `end`.
    fn action(&mut self, parts: &mut Vec<Part>) -> Result<bool, String> {
        loop {
            self.skip_spaces();
            match self.peek() {
                None => return Err("unclosed action".into()),
                Some('}') => {
                    self.at += 1;
                    return Ok(false);
                }
                Some('"' | '\'') => parts.push(Part::Text(self.quoted()?)),
                _ if self.word("range") => {
                    let steps = self.path()?;
                    self.close()?;
                    let body = self.parts(true)?;
                    parts.push(Part::Range(steps, body));
                    return Ok(false);
                }
                _ if self.word("end") => {
                    self.close()?;
                    return Ok(true);
                }
                _ => parts.push(Part::Path(self.path()?)),
            }
        }
    }

    /// A keyword that stands alone.
    fn word(&mut self, word: &str) -> bool {
        let start = self.at;
        let ends = |c: Option<char>| c.is_none_or(|c| c.is_whitespace() || c == '}');
        if self.eat(word) && ends(self.peek()) {
            self.skip_spaces();
            return true;
        }
        self.at = start;
        false
    }

    fn close(&mut self) -> Result<(), String> {
        self.skip_spaces();
        if self.eat("}") { Ok(()) } else { Err("unclosed action".into()) }
    }

    fn quoted(&mut self) -> Result<String, String> {
        let quote = self.peek();
        self.at += 1;
        let mut text = String::new();
        while let Some(c) = self.peek() {
            self.at += 1;
            match c {
                _ if Some(c) == quote => return Ok(text),
                '\\' => {
                    let escaped = self.peek().ok_or("unterminated quoted string")?;
                    self.at += 1;
                    text.push(match escaped {
                        'n' => '\n',
                        't' => '\t',
                        'r' => '\r',
                        other => other,
                    });
                }
                _ => text.push(c),
            }
        }
        Err("unterminated quoted string".into())
    }

    fn path(&mut self) -> Result<Vec<Step>, String> {
        let mut steps = Vec::new();
        let start = self.at;
        if self.eat("$") {
            steps.push(Step::Root);
        } else {
            self.eat("@");
        }
        loop {
            if self.eat("..") {
                steps.push(Step::Descend);
                if self.peek().is_some_and(|c| c != '[' && c != '}') {
                    steps.push(self.field()?);
                }
            } else if self.eat(".") {
                // A lone dot is the value itself.
                if self.peek().is_some_and(|c| c == '[' || c == '}' || c.is_whitespace()) {
                    continue;
                }
                steps.push(self.field()?);
            } else if self.eat("[") {
                steps.push(self.bracket()?);
            } else if self.at == start {
                // `{metadata.name}` without the leading dot.
                if self.peek().is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '*') {
                    steps.push(self.field()?);
                    continue;
                }
                return Err(format!("unrecognized character in action: {:?}", self.peek().unwrap_or(' ')));
            } else {
                return Ok(steps);
            }
        }
    }

    fn field(&mut self) -> Result<Step, String> {
        let mut name = String::new();
        while let Some(c) = self.peek() {
            match c {
                '\\' => {
                    self.at += 1;
                    name.extend(self.peek());
                }
                '.' | '[' | ']' | '}' | ')' | '(' | ',' | '=' | '!' | '<' | '>' | '"' | '\'' => break,
                c if c.is_whitespace() => break,
                c => name.push(c),
            }
            self.at += 1;
        }
        match name.as_str() {
            "" => Err("a field name is missing after '.'".into()),
            "*" => Ok(Step::Wildcard),
            _ => Ok(Step::Field(name)),
        }
    }

    fn bracket(&mut self) -> Result<Step, String> {
        self.skip_spaces();
        if self.eat("?(") {
            return self.filter();
        }
        let mut steps = Vec::new();
        loop {
            self.skip_spaces();
            steps.push(match self.peek() {
                Some('\'' | '"') => Step::Field(self.quoted()?),
                Some('*') => {
                    self.at += 1;
                    Step::Wildcard
                }
                _ => self.index_or_slice()?,
            });
            self.skip_spaces();
            if self.eat("]") {
                break;
            }
            if !self.eat(",") {
                return Err("unterminated array".into());
            }
        }
        Ok(if steps.len() == 1 { steps.remove(0) } else { Step::Union(steps) })
    }

    fn index_or_slice(&mut self) -> Result<Step, String> {
        let first = self.number()?;
        if !self.eat(":") {
            return first.map(Step::Index).ok_or_else(|| "invalid array index".into());
        }
        let end = self.number()?;
        let step = if self.eat(":") { self.number()?.unwrap_or(1) } else { 1 };
        if step < 1 {
            return Err("step must be > 0".into());
        }
        Ok(Step::Slice(first, end, step))
    }

    fn number(&mut self) -> Result<Option<i64>, String> {
        let mut digits = String::new();
        while let Some(c) = self.peek().filter(|c| c.is_ascii_digit() || *c == '-') {
            digits.push(c);
            self.at += 1;
        }
        if digits.is_empty() {
            return Ok(None);
        }
        digits.parse().map(Some).map_err(|_| format!("invalid array index {digits}"))
    }

    fn filter(&mut self) -> Result<Step, String> {
        let left = self.operand()?;
        self.skip_spaces();
        let operators = [
            ("==", Operator::Equal),
            ("!=", Operator::NotEqual),
            ("<=", Operator::LessEqual),
            (">=", Operator::GreaterEqual),
            ("<", Operator::Less),
            (">", Operator::Greater),
        ];
        let operator = operators.into_iter().find(|(text, _)| self.eat(text)).map(|(_, operator)| operator);
        let test = match operator {
            Some(operator) => Some((operator, self.operand()?)),
            None => None,
        };
        self.skip_spaces();
        if !self.eat(")") {
            return Err("unterminated filter".into());
        }
        self.skip_spaces();
        if self.eat("]") { Ok(Step::Filter(left, test)) } else { Err("unterminated filter".into()) }
    }

    fn operand(&mut self) -> Result<Operand, String> {
        self.skip_spaces();
        match self.peek() {
            Some('"' | '\'') => Ok(Operand::Literal(self.quoted()?.into())),
            Some('@' | '$' | '.') => Ok(Operand::Path(self.path()?)),
            _ => {
                let mut word = String::new();
                while let Some(c) = self.peek().filter(|c| c.is_alphanumeric() || "-.+_".contains(*c)) {
                    word.push(c);
                    self.at += 1;
                }
                let literal =
                    serde_json::from_str::<Value>(&word).ok().filter(|v| v.is_number() || v.is_boolean());
                literal.map(Operand::Literal).ok_or_else(|| format!("unrecognized word {word:?} in a filter"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pods() -> Value {
        json!({"kind":"List","items":[
            {"metadata":{"name":"a","labels":{"app.kubernetes.io/name":"x"}},"status":{"phase":"Running","n":1},
             "conditions":[{"type":"Ready","status":"True"},{"type":"Other","status":"False"}]},
            {"metadata":{"name":"b"},"status":{"phase":"Pending","n":2}},
            {"metadata":{"name":"c"},"status":{"phase":"Running","n":3}}]})
    }

    #[test]
    fn templates_print_as_kubectl_prints_them() {
        for (template, expected) in [
            ("{.kind}", "List"),
            ("{kind}", "List"),
            ("kind: {.kind}!", "kind: List!"),
            ("{.items[*].metadata.name}", "a b c"),
            ("{.items[0].metadata.name}", "a"),
            ("{.items[-1].metadata.name}", "c"),
            ("{.items[0:2].metadata.name}", "a b"),
            ("{.items[::2].metadata.name}", "a c"),
            ("{.items[0,2].metadata.name}", "a c"),
            ("{.items[9].metadata.name}", ""),
            ("{.items[*]['metadata.name','status.n']}", ""),
            ("{.items[*].status['phase','n']}", "Running 1 Pending 2 Running 3"),
            ("{.items[0].metadata.labels.app\\.kubernetes\\.io/name}", "x"),
            ("{.items[0].metadata.labels['app.kubernetes.io/name']}", "x"),
            (
                "{range .items[*]}{.metadata.name}{\"\\t\"}{.status.phase}{\"\\n\"}{end}",
                "a\tRunning\nb\tPending\nc\tRunning\n",
            ),
            ("{range .items[*]}{.metadata.name}={$.kind} {end}", "a=List b=List c=List "),
            ("{.items[?(@.status.phase==\"Running\")].metadata.name}", "a c"),
            ("{.items[?(@.status.phase=='Pending')].metadata.name}", "b"),
            ("{.items[?(@.status.n>=2)].metadata.name}", "b c"),
            ("{.items[?(@.metadata.labels)].metadata.name}", "a"),
            ("{.items[0].conditions[?(@.type==\"Ready\")].status}", "True"),
            ("{..name}", "a b c"),
            ("{.items[0].status}", "{\"n\":1,\"phase\":\"Running\"}"),
            ("{.items[*].status.n}", "1 2 3"),
            ("{range .items[0:1]}{range .conditions[*]}{.type},{end}{end}", "Ready,Other,"),
            ("{.missing.field}", ""),
        ] {
            let parsed = Template::parse(template).unwrap_or_else(|e| panic!("{template}: {e}"));
            assert_eq!(parsed.render(&pods()), expected, "{template}");
        }
    }

    #[test]
    fn broken_templates_are_refused() {
        for template in ["{.a", "{range .a}", "{end}", "{.a[}", "{.a[?(@.b==)]}", "{\"x}", "{.a[0:1:0]}"] {
            assert!(Template::parse(template).is_err(), "{template}");
        }
    }

    #[test]
    fn relaxed_expressions_need_no_braces() {
        for text in [".metadata.name", "metadata.name", "{.metadata.name}", "{metadata.name}"] {
            let found = Template::relaxed(text).expect("parses").render(&json!({"metadata":{"name":"x"}}));
            assert_eq!(found, "x", "{text}");
        }
    }
}
