//! YAML as kubectl prints it: keys sorted, lists not indented, strings quoted only where they must be.
//!
//! Follows go-yaml's choices (`sigs.k8s.io/yaml`), which the emitter of our YAML library does not: double
//! quotes around what would read as another type, single quotes around what would read as syntax.

use serde_json::Value;

/// The document, ended by a new line.
pub fn print(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => object(value, 0, &mut out),
        Value::Array(items) if !items.is_empty() => list(items, 0, &mut out),
        other => {
            out.push_str(&scalar(other, 0));
            out.push('\n');
        }
    }
    out
}

fn object(value: &Value, indent: usize, out: &mut String) {
    let Value::Object(map) = value else { return };
    let mut keys: Vec<&String> = map.keys().collect();
    keys.sort();
    for (index, key) in keys.into_iter().enumerate() {
        // The first key of a list item stands behind its dash.
        if index > 0 || !out.ends_with("- ") {
            out.extend(std::iter::repeat_n(' ', indent));
        }
        out.push_str(&text(key, indent));
        out.push(':');
        match &map[key] {
            Value::Object(inner) if !inner.is_empty() => {
                out.push('\n');
                object(&map[key], indent + 2, out);
            }
            Value::Array(items) if !items.is_empty() => {
                out.push('\n');
                list(items, indent, out);
            }
            other => {
                out.push(' ');
                out.push_str(&scalar(other, indent + 2));
                out.push('\n');
            }
        }
    }
}

fn list(items: &[Value], indent: usize, out: &mut String) {
    for item in items {
        if !out.ends_with("- ") {
            out.extend(std::iter::repeat_n(' ', indent));
        }
        out.push_str("- ");
        match item {
            Value::Object(map) if !map.is_empty() => object(item, indent + 2, out),
            Value::Array(inner) if !inner.is_empty() => list(inner, indent + 2, out),
            other => {
                out.push_str(&scalar(other, indent + 2));
                out.push('\n');
            }
        }
    }
}

fn scalar(value: &Value, indent: usize) -> String {
    match value {
        Value::String(string) if string.contains('\n') && can_be_literal(string) => literal(string, indent),
        Value::String(string) => text(string, indent),
        other => other.to_string(),
    }
}

fn can_be_literal(string: &str) -> bool {
    !string.chars().any(|c| c != '\n' && c != '\t' && c.is_control())
        && !string.starts_with([' ', '\n', '\t'])
        && !string.lines().any(|l| l.ends_with(' '))
}

fn literal(string: &str, indent: usize) -> String {
    let trailing = string.len() - string.trim_end_matches('\n').len();
    let mut out = String::from(match trailing {
        0 => "|-",
        1 => "|",
        _ => "|+",
    });
    let body = string.strip_suffix('\n').unwrap_or(string);
    for line in body.split('\n') {
        out.push('\n');
        if !line.is_empty() {
            out.extend(std::iter::repeat_n(' ', indent));
            out.push_str(line);
        }
    }
    out
}

fn text(string: &str, _indent: usize) -> String {
    if string.is_empty() || reads_as_other_type(string) {
        return format!("\"{string}\"");
    }
    if string.chars().any(char::is_control) {
        // JSON's escapes are a subset of YAML's.
        return Value::from(string).to_string();
    }
    if needs_quotes(string) { format!("'{}'", string.replace('\'', "''")) } else { string.to_owned() }
}

/// Would YAML 1.1 read this as null, a boolean, a number or a time?
fn reads_as_other_type(string: &str) -> bool {
    const WORDS: [&str; 11] = ["null", "~", "true", "false", "yes", "no", "on", "off", "y", "n", "<<"];
    let cased = |word: &str| {
        let upper = word.to_uppercase();
        let capital = upper.chars().take(1).chain(word.chars().skip(1)).collect::<String>();
        string == word || string == upper || string == capital
    };
    WORDS.into_iter().any(cased) || is_number(string) || is_time(string)
}

fn is_number(string: &str) -> bool {
    let unsigned = string.strip_prefix(['-', '+']).unwrap_or(string);
    let radix = |prefix: &str, radix: u32| {
        unsigned
            .strip_prefix(prefix)
            .is_some_and(|d| !d.is_empty() && d.chars().all(|c| c.is_digit(radix) || c == '_'))
    };
    if radix("0x", 16)
        || radix("0b", 2)
        || radix("0o", 8)
        || [".inf", ".Inf", ".INF", ".nan", ".NaN", ".NAN"].contains(&unsigned)
    {
        return true;
    }
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        || !unsigned.contains(|c: char| c.is_ascii_digit())
    {
        return false;
    }
    let digits = unsigned.replace('_', "");
    let sexagesimal = digits.contains(':')
        && digits.split(':').all(|p| !p.is_empty() && p.chars().all(|c| c.is_ascii_digit()));
    sexagesimal
        || (digits.parse::<f64>().is_ok()
            && digits.chars().all(|c| c.is_ascii_digit() || ".eE+-".contains(c)))
}

/// `2026-01-02`, with or without a time behind it.
fn is_time(string: &str) -> bool {
    let bytes = string.as_bytes();
    if bytes.len() < 8 || !bytes[..4].iter().all(u8::is_ascii_digit) || bytes[4] != b'-' {
        return false;
    }
    string.parse::<jiff::civil::Date>().is_ok() && bytes.len() == 10
        || string.parse::<jiff::Timestamp>().is_ok()
}

fn needs_quotes(string: &str) -> bool {
    string.starts_with(|c: char| "-?:,[]{}#&*!|>'\"%@`=".contains(c)) && !plain_dash(string)
        || string.starts_with(' ')
        || string.ends_with([' ', ':'])
        || string.contains(": ")
        || string.contains(" #")
        || string.starts_with("---")
        || string.starts_with("...")
}

/// `-x`, `:x` and `?x` are plain words.
fn plain_dash(string: &str) -> bool {
    let mut chars = string.chars();
    matches!(chars.next(), Some('-' | ':' | '?')) && chars.next().is_some_and(|c| !c.is_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn scalars_are_quoted_as_upstream_quotes_them() {
        for (value, printed) in [
            (json!("nginx:latest"), "nginx:latest"),
            (json!("80"), "\"80\""),
            (json!("true"), "\"true\""),
            (json!("Yes"), "\"Yes\""),
            (json!(""), "\"\""),
            (json!("2026-01-02T03:04:05Z"), "\"2026-01-02T03:04:05Z\""),
            (json!("a: b"), "'a: b'"),
            (json!("*"), "'*'"),
            (json!("it's"), "it's"),
            (json!("'x"), "'''x'"),
            (json!("-c"), "-c"),
            (json!("100m"), "100m"),
            (json!("1.5"), "\"1.5\""),
            (json!("1e3"), "\"1e3\""),
            (json!("10.0.0.1"), "10.0.0.1"),
            (json!("10.0.0.0/24"), "10.0.0.0/24"),
            (json!(80), "80"),
            (json!(null), "null"),
            (json!({}), "{}"),
            (json!([]), "[]"),
        ] {
            assert_eq!(print(&value), format!("{printed}\n"), "{value}");
        }
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        let object = json!({"b":[{"x":1,"a":["p",["q"],{}]},"s"],"a":{"n":{"t":"one\ntwo\n","u":"one\ntwo","w":" lead\nx","v":"tab\there"}},
            "c":"#no","d":"a #b","e":"0x10","f":"y","g":"ends:","h":"\u{7}"});
        let text = print(&object);
        let back: serde_json::Value =
            serde_yaml_ng::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(back, object, "{text}");
    }

    #[test]
    fn lists_are_not_indented() {
        let object = json!({"spec":{"containers":[{"image":"nginx","name":"a"}],"args":["x"]}});
        assert_eq!(print(&object), "spec:\n  args:\n  - x\n  containers:\n  - image: nginx\n    name: a\n");
    }
}
