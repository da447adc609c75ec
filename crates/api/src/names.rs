//! Names and their rules: RFC 1123 labels and subdomains, label keys and values, port names.
//!
//! Each check returns the problems in upstream's words; an empty list means the name is good.

use std::sync::LazyLock;

use regex::Regex;

pub const DNS_LABEL_MAX: usize = 63;
pub const DNS_SUBDOMAIN_MAX: usize = 253;

const DNS_LABEL: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
const QUALIFIED: &str = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]";

static LABEL_RE: LazyLock<Regex> = LazyLock::new(|| anchored(DNS_LABEL));
static LABEL_1035_RE: LazyLock<Regex> = LazyLock::new(|| anchored("[a-z]([-a-z0-9]*[a-z0-9])?"));
static SUBDOMAIN_RE: LazyLock<Regex> = LazyLock::new(|| anchored(&format!(r"{DNS_LABEL}(\.{DNS_LABEL})*")));
static QUALIFIED_RE: LazyLock<Regex> = LazyLock::new(|| anchored(QUALIFIED));
static LABEL_VALUE_RE: LazyLock<Regex> = LazyLock::new(|| anchored(&format!("({QUALIFIED})?")));
static CONFIG_KEY_RE: LazyLock<Regex> = LazyLock::new(|| anchored("[-._a-zA-Z0-9]+"));
static ENV_NAME_RE: LazyLock<Regex> = LazyLock::new(|| anchored("[-._a-zA-Z][-._a-zA-Z0-9]*"));

static PATH_RE: LazyLock<Regex> = LazyLock::new(|| anchored(r"[A-Za-z0-9/\-._~%!$&'()*+,;=:]+"));

fn anchored(pattern: &str) -> Regex {
    Regex::new(&format!("^(?:{pattern})$")).expect("a constant pattern compiles")
}

fn too_long(max: usize) -> String {
    format!("must be no more than {max} characters")
}

fn regex_error(message: &str, pattern: &str, examples: &[&str]) -> String {
    // Two blanks before each "or": upstream's wording, which clients match.
    let list = examples.iter().map(|e| format!("'{e}'")).collect::<Vec<_>>().join(",  or ");
    format!("{message} (e.g. {list}, regex used for validation is '{pattern}')")
}

/// RFC 1123 label: namespaces, container names, port names of services.
pub fn dns_label(name: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if name.len() > DNS_LABEL_MAX {
        problems.push(too_long(DNS_LABEL_MAX));
    }
    if !LABEL_RE.is_match(name) {
        problems.push(regex_error(
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character",
            DNS_LABEL,
            &["my-name", "123-abc"],
        ));
    }
    problems
}

/// RFC 1035 label: service names.
pub fn dns_label_1035(name: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if name.len() > DNS_LABEL_MAX {
        problems.push(too_long(DNS_LABEL_MAX));
    }
    if !LABEL_1035_RE.is_match(name) {
        problems.push(regex_error(
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character",
            "[a-z]([-a-z0-9]*[a-z0-9])?",
            &["my-name", "abc-123"],
        ));
    }
    problems
}

/// RFC 1123 subdomain: most object names.
pub fn dns_subdomain(name: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if name.len() > DNS_SUBDOMAIN_MAX {
        problems.push(too_long(DNS_SUBDOMAIN_MAX));
    }
    if !SUBDOMAIN_RE.is_match(name) {
        problems.push(regex_error(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character",
            &format!(r"{DNS_LABEL}(\.{DNS_LABEL})*"),
            &["example.com"],
        ));
    }
    problems
}

/// RFC 1123 subdomain whose first label may be `*`: hosts of Ingresses.
pub fn wildcard_subdomain(name: &str) -> Vec<String> {
    match name.strip_prefix("*.") {
        Some(rest) if SUBDOMAIN_RE.is_match(rest) && name.len() <= DNS_SUBDOMAIN_MAX => Vec::new(),
        _ => vec![regex_error(
            "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must consist of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character",
            &format!(r"\*\.{DNS_LABEL}(\.{DNS_LABEL})*"),
            &["*.example.com"],
        )],
    }
}

/// `acme.io/foo`: a domain and a path.
pub fn domain_prefixed_path(name: &str) -> Vec<String> {
    let Some((domain, path)) = name.split_once('/').filter(|(d, p)| !d.is_empty() && !p.is_empty()) else {
        return vec!["must be a domain-prefixed path (such as \"acme.io/foo\")".into()];
    };
    let mut problems = dns_subdomain(domain);
    if !PATH_RE.is_match(path) {
        let pattern = r"[A-Za-z0-9/\-._~%!$&'()*+,;=:]+";
        problems.push(format!("Invalid path (regex used for validation is '{pattern}')"));
    }
    problems
}

/// Names that only must be one path segment: RBAC objects.
pub fn path_segment(name: &str) -> Vec<String> {
    if name == "." || name == ".." {
        return vec![format!("may not be '{name}'")];
    }
    ["/", "%"].iter().filter(|c| name.contains(**c)).map(|c| format!("may not contain '{c}'")).collect()
}

/// Label and annotation keys: an optional DNS prefix, a slash, a name.
pub fn qualified_name(key: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let parts: Vec<&str> = key.split('/').collect();
    let example = ["MyName", "my.name", "123-abc"];
    let words = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character";
    let name = match parts[..] {
        [name] => name,
        [prefix, name] => {
            if prefix.is_empty() {
                problems.push("prefix part must be non-empty".into());
            } else {
                problems.extend(dns_subdomain(prefix).into_iter().map(|p| format!("prefix part {p}")));
            }
            name
        }
        _ => {
            let text = regex_error(&format!("a qualified name {words}"), QUALIFIED, &example);
            return vec![format!(
                "{text} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            )];
        }
    };
    if name.is_empty() {
        problems.push("name part must be non-empty".into());
    } else if name.len() > DNS_LABEL_MAX {
        problems.push(format!("name part {}", too_long(DNS_LABEL_MAX)));
    }
    if !QUALIFIED_RE.is_match(name) {
        problems.push(regex_error(&format!("name part {words}"), QUALIFIED, &example));
    }
    problems
}

/// Label values: at most 63 characters, empty allowed.
pub fn label_value(value: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if value.len() > DNS_LABEL_MAX {
        problems.push(too_long(DNS_LABEL_MAX));
    }
    if !LABEL_VALUE_RE.is_match(value) {
        problems.push(regex_error(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character",
            "(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?",
            &["MyValue", "my_value", "12345"],
        ));
    }
    problems
}

/// Keys of ConfigMaps and Secrets.
pub fn config_key(key: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if key.len() > DNS_SUBDOMAIN_MAX {
        problems.push(too_long(DNS_SUBDOMAIN_MAX));
    }
    if !CONFIG_KEY_RE.is_match(key) {
        problems.push(regex_error(
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
            "[-._a-zA-Z0-9]+",
            &["key.name", "KEY_NAME", "key-name"],
        ));
    }
    match key {
        "." => problems.push("must not be '.'".into()),
        ".." => problems.push("must not be '..'".into()),
        _ if key.starts_with("..") => problems.push("must not start with '..'".into()),
        _ => {}
    }
    problems
}

/// Names of environment variables: any printable ASCII but `=` (KEP-4369).
pub fn env_name(name: &str) -> Vec<String> {
    if !name.is_empty() && name.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'=') {
        return Vec::new();
    }
    vec![
        "a valid environment variable name must consist only of printable ASCII characters other than '='"
            .into(),
    ]
}

/// The strict form that `envFrom` keys had before KEP-4369.
pub fn is_c_identifier_like(name: &str) -> bool {
    ENV_NAME_RE.is_match(name)
}

/// IANA service names: names of container ports.
pub fn port_name(name: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if name.len() > 15 {
        problems.push("must be no more than 15 characters".into());
    }
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        problems.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".into());
    }
    if !name.bytes().any(|b| b.is_ascii_lowercase()) {
        problems.push("must contain at least one letter (a-z)".into());
    }
    if name.contains("--") {
        problems.push("must not contain consecutive hyphens".into());
    }
    if name.starts_with('-') || name.ends_with('-') {
        problems.push("must not begin or end with a hyphen".into());
    }
    problems
}

/// Ports from 1 to 65535.
pub fn port_number(port: i64) -> Vec<String> {
    if (1..=65_535).contains(&port) {
        Vec::new()
    } else {
        vec!["must be between 1 and 65535, inclusive".into()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names_have_no_problems_and_bad_ones_do() {
        for good in ["a", "web-1", "1a"] {
            assert!(dns_label(good).is_empty(), "{good}");
        }
        for bad in ["", "-a", "A", "a.b", &"x".repeat(64)] {
            assert!(!dns_label(bad).is_empty(), "{bad}");
        }
        assert!(qualified_name("example.com/My_Name.1").is_empty());
        for bad in ["", "/a", "a/", "a/b/c", "-x"] {
            assert!(!qualified_name(bad).is_empty(), "{bad}");
        }
        assert!(label_value("").is_empty() && !label_value("a b").is_empty());
    }
}
