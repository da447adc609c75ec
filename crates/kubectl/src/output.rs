//! How objects are printed: `-o yaml|json|name|jsonpath=|custom-columns=`.

use clap::Args;
use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::jsonpath::{self, Template};
use crate::table::{GET, Growing, align};
use crate::yaml;

/// The flags of every verb that prints objects.
#[derive(Args, Clone, Default)]
pub struct OutputArgs {
    /// Output format: json, yaml, name, jsonpath=..., jsonpath-as-json=..., jsonpath-file=..., custom-columns=..., custom-columns-file=..., wide.
    #[arg(short, long)]
    pub output: Option<String>,
    /// If true, keep the managedFields when printing objects in JSON or YAML format.
    #[arg(long)]
    pub show_managed_fields: bool,
    /// Template string or path for -o jsonpath or custom-columns given without `=`.
    #[arg(long)]
    pub template: Option<String>,
}

/// A chosen format.
pub enum Format {
    /// The server's table; with its wide columns or without.
    Table {
        wide: bool,
    },
    Json,
    Yaml,
    Name,
    JsonPath(Template),
    JsonPathAsJson(Template),
    Columns(Vec<(String, Template)>),
}

impl OutputArgs {
    pub fn format(&self) -> Result<Format> {
        let text = self.output.as_deref().unwrap_or_default();
        let (name, mut argument) = text.split_once('=').unwrap_or((text, ""));
        if argument.is_empty() {
            argument = self.template.as_deref().unwrap_or_default();
        }
        let template = |text: &str| {
            Template::parse(text).map_err(|e| Error::plain(format!("error parsing jsonpath {text}, {e}")))
        };
        match name {
            "" => Ok(Format::Table { wide: false }),
            "wide" => Ok(Format::Table { wide: true }),
            "json" => Ok(Format::Json),
            "yaml" => Ok(Format::Yaml),
            "name" => Ok(Format::Name),
            "jsonpath" if argument.is_empty() => {
                Err(Error::plain("template format specified but no template given"))
            }
            "jsonpath" => Ok(Format::JsonPath(template(argument)?)),
            "jsonpath-as-json" => Ok(Format::JsonPathAsJson(template(argument)?)),
            "jsonpath-file" => Ok(Format::JsonPath(template(&read_template(argument)?)?)),
            "custom-columns" => columns(argument),
            "custom-columns-file" => columns_from_file(&read_template(argument)?),
            "go-template" | "go-template-file" | "template" | "templatefile" => {
                Err(Error::refused("-o go-template", "use -o jsonpath=... or -o custom-columns=..."))
            }
            _ => Err(Error::plain(format!(
                "unable to match a printer suitable for the output format {text:?}, allowed formats are: custom-columns,custom-columns-file,json,jsonpath,jsonpath-as-json,jsonpath-file,name,wide,yaml"
            ))),
        }
    }

    /// Prints the outcome for one object: `deployment.apps/web created`, or the object in the chosen format.
    pub fn done(&self, named: &str, object: &Value, what: &str) -> Result<()> {
        match self.format()? {
            Format::Table { .. } if self.output.is_none() => println!("{named} {what}"),
            format => print!("{}", self.one(&format, named, object)?),
        }
        Ok(())
    }

    /// One object in this format.
    pub fn one(&self, format: &Format, named: &str, object: &Value) -> Result<String> {
        let mut object = object.clone();
        if !self.show_managed_fields {
            strip_managed_fields(&mut object);
        }
        Ok(match format {
            Format::Json => json_text(&object),
            Format::Yaml => yaml::print(&object),
            Format::Name => format!("{named}\n"),
            Format::JsonPath(template) => template.render(&object),
            Format::JsonPathAsJson(template) => json_text(&json!(template.find(&object))),
            Format::Columns(columns) => custom_columns(columns, std::slice::from_ref(&object), true),
            Format::Table { .. } => return Err(Error::plain("-o wide prints tables, which only `get` has")),
        })
    }
}

fn read_template(path: &str) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::plain(format!("error reading template {path}, {e}")))
}

/// Takes out what only the server needs, of an object or of each in a list.
pub fn strip_managed_fields(object: &mut Value) {
    object.remove_at("metadata.managedFields");
    if let Some(Value::Array(items)) = object.get_mut("items") {
        items.iter_mut().for_each(strip_managed_fields);
    }
}

/// JSON, indented by four as upstream does.
pub fn json_text(value: &Value) -> String {
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    serde::Serialize::serialize(value, &mut serializer).expect("writing JSON to memory cannot fail");
    let mut text = String::from_utf8(bytes).expect("JSON is UTF-8");
    text.push('\n');
    text
}

/// What `get` prints for several objects.
pub fn list_of(items: Vec<Value>) -> Value {
    json!({ "apiVersion": "v1", "kind": "List", "metadata": { "resourceVersion": "" }, "items": items })
}

fn columns(spec: &str) -> Result<Format> {
    if spec.is_empty() {
        return Err(Error::plain("custom-columns format specified but no custom columns given"));
    }
    let mut columns = Vec::new();
    for column in split_columns(spec) {
        let Some((header, path)) = column.split_once(':') else {
            return Err(Error::plain(format!(
                "unexpected custom-columns spec: {column}, expected <header>:<json-path-expr>"
            )));
        };
        columns.push((header.to_owned(), relaxed(path)?));
    }
    Ok(Format::Columns(columns))
}

/// Commas inside brackets belong to the path.
fn split_columns(spec: &str) -> Vec<String> {
    let (mut columns, mut depth) = (vec![String::new()], 0);
    for c in spec.chars() {
        match c {
            ',' if depth == 0 => {
                columns.push(String::new());
                continue;
            }
            '[' | '(' => depth += 1,
            ']' | ')' => depth -= 1,
            _ => {}
        }
        if let Some(last) = columns.last_mut() {
            last.push(c);
        }
    }
    columns
}

fn columns_from_file(text: &str) -> Result<Format> {
    let mut lines = text.lines();
    let headers = lines.next().unwrap_or_default().split_whitespace();
    let paths: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    let headers: Vec<&str> = headers.collect();
    if headers.is_empty() || headers.len() != paths.len() {
        return Err(Error::plain(format!(
            "number of headers ({}) and field specifications ({}) don't match",
            headers.len(),
            paths.len()
        )));
    }
    let columns = headers.iter().zip(paths).map(|(h, p)| Ok((h.to_string(), relaxed(p)?)));
    Ok(Format::Columns(columns.collect::<Result<_>>()?))
}

fn relaxed(path: &str) -> Result<Template> {
    Template::relaxed(path).map_err(|e| Error::plain(format!("error parsing jsonpath {path}, {e}")))
}

/// Objects in the user's own columns; what is missing shows as `<none>`.
pub fn custom_columns(columns: &[(String, Template)], items: &[Value], headers: bool) -> String {
    let mut text = String::new();
    if headers {
        text += &columns.iter().map(|(h, _)| h.as_str()).collect::<Vec<_>>().join("\t");
        text.push('\n');
    }
    for item in items {
        let cells = columns.iter().map(|(_, template)| {
            let found: Vec<String> =
                template.find(item).into_iter().filter(|v| !v.is_null()).map(jsonpath::print).collect();
            if found.is_empty() { "<none>".to_owned() } else { found.join(",") }
        });
        text += &cells.collect::<Vec<_>>().join("\t");
        text.push('\n');
    }
    align(&text, GET)
}

/// What to show of the server's tables.
#[derive(Default, Clone)]
pub struct TableOptions {
    pub wide: bool,
    pub headers: bool,
    pub namespace: bool,
    pub show_labels: bool,
    pub label_columns: Vec<String>,
    /// Put in front of each name when several types are shown: `deployment.apps`.
    pub prefix: Option<String>,
    /// The type of a watch's event as the first column.
    pub events: bool,
}

/// Prints tables; widths only grow while a watch runs.
pub struct TablePrinter {
    options: TableOptions,
    growing: Growing,
    headers_printed: bool,
    columns: Vec<Value>,
}

impl TablePrinter {
    pub fn new(options: TableOptions) -> Self {
        TablePrinter { options, growing: Growing::default(), headers_printed: false, columns: Vec::new() }
    }

    /// The lines of one table. Tables of a watch after the first have no column definitions.
    pub fn print(&mut self, table: &Value, event: Option<&str>) -> String {
        if !table.list_at("columnDefinitions").is_empty() {
            self.columns = table.list_at("columnDefinitions").to_vec();
        }
        let mut rows = Vec::new();
        if self.options.headers && !self.headers_printed {
            rows.push(self.header());
            self.headers_printed = true;
        }
        rows.extend(table.list_at("rows").iter().map(|row| self.row(row, event)));
        self.growing.rows(&rows)
    }

    fn shown(&self) -> impl Iterator<Item = (usize, &Value)> {
        let wide = self.options.wide;
        self.columns.iter().enumerate().filter(move |(_, c)| wide || c.int_at("priority").unwrap_or(0) == 0)
    }

    fn header(&self) -> Vec<String> {
        let options = &self.options;
        let mut cells = Vec::new();
        cells.extend(options.events.then(|| "EVENT".to_owned()));
        cells.extend(options.namespace.then(|| "NAMESPACE".to_owned()));
        cells.extend(self.shown().map(|(_, column)| column.str_at("name").to_uppercase()));
        cells.extend(
            options.label_columns.iter().map(|key| key.rsplit('/').next().unwrap_or(key).to_uppercase()),
        );
        cells.extend(options.show_labels.then(|| "LABELS".to_owned()));
        cells
    }

    fn row(&self, row: &Value, event: Option<&str>) -> Vec<String> {
        let options = &self.options;
        let labels = row.map_at("object.metadata.labels");
        let mut cells = Vec::new();
        if options.events {
            cells.push(event.unwrap_or_default().to_owned());
        }
        if options.namespace {
            cells.push(row.str_at("object.metadata.namespace").to_owned());
        }
        for (shown, (index, _)) in self.shown().enumerate() {
            let cell = row.list_at("cells").get(index).map(cell_text).unwrap_or_default();
            let prefix = options.prefix.as_ref().filter(|_| shown == 0);
            cells.push(prefix.map_or_else(|| cell.clone(), |p| format!("{p}/{cell}")));
        }
        for key in &options.label_columns {
            cells
                .push(labels.and_then(|l| l.get(key)).and_then(Value::as_str).unwrap_or_default().to_owned());
        }
        if options.show_labels {
            cells.push(labels_text(labels));
        }
        cells
    }
}

/// One line per cell: what follows a line break is cut, as upstream does.
fn cell_text(cell: &Value) -> String {
    let text = jsonpath::print(cell);
    match text.split_once(['\n', '\r', '\u{c}']) {
        Some((first, _)) => format!("{first}..."),
        None => text,
    }
}

/// `a=b,c=d`, or `<none>`.
pub fn labels_text(labels: Option<&serde_json::Map<String, Value>>) -> String {
    let pairs: Vec<String> = labels
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
        .collect();
    if pairs.is_empty() { "<none>".into() } else { pairs.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Value {
        json!({"columnDefinitions":[{"name":"Name"},{"name":"Ready"},{"name":"IP","priority":1}],
            "rows":[{"cells":["web-1","1/1","10.0.0.1"],"object":{"metadata":{"namespace":"x","labels":{"app":"web"}}}},
                    {"cells":["b","0/1",null],"object":{"metadata":{"namespace":"yy"}}}]})
    }

    #[test]
    fn tables_show_what_was_asked_for() {
        let plain = TableOptions { headers: true, ..TableOptions::default() };
        for (options, expected) in [
            (plain.clone(), "NAME    READY\nweb-1   1/1\nb       0/1\n"),
            (TableOptions { headers: false, ..plain.clone() }, "web-1   1/1\nb       0/1\n"),
            (
                TableOptions { wide: true, ..plain.clone() },
                "NAME    READY   IP\nweb-1   1/1     10.0.0.1\nb       0/1     \n",
            ),
            (
                TableOptions { namespace: true, ..plain.clone() },
                "NAMESPACE   NAME    READY\nx           web-1   1/1\nyy          b       0/1\n",
            ),
            (
                TableOptions { show_labels: true, ..plain.clone() },
                "NAME    READY   LABELS\nweb-1   1/1     app=web\nb       0/1     <none>\n",
            ),
            (
                TableOptions { label_columns: vec!["app".into()], ..plain.clone() },
                "NAME    READY   APP\nweb-1   1/1     web\nb       0/1     \n",
            ),
            (
                TableOptions { prefix: Some("pod".into()), ..plain.clone() },
                "NAME        READY\npod/web-1   1/1\npod/b       0/1\n",
            ),
        ] {
            assert_eq!(TablePrinter::new(options).print(&table(), None), expected);
        }
    }

    #[test]
    fn custom_columns_show_none_for_what_is_missing() {
        let Ok(Format::Columns(spec)) = columns("NAME:.metadata.name,PORTS:.spec.ports[*].port") else {
            panic!("parses")
        };
        let items = [
            json!({"metadata":{"name":"a"},"spec":{"ports":[{"port":1},{"port":2}]}}),
            json!({"metadata":{"name":"b"}}),
        ];
        assert_eq!(custom_columns(&spec, &items, true), "NAME   PORTS\na      1,2\nb      <none>\n");
    }

    #[test]
    fn formats_not_built_are_refused_by_name() {
        let args = |output: &str| OutputArgs { output: Some(output.into()), ..OutputArgs::default() };
        let refusal = |output: &str| args(output).format().err().map(|e| e.to_string()).unwrap_or_default();
        assert!(refusal("go-template={{.x}}").contains("go-template is not built"));
        assert!(refusal("foo").contains("unable to match a printer suitable for the output format \"foo\""));
    }
}
