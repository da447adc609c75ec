//! Which plugins run at which extension point: the defaults, what `multiPoint` changes of them for all points, and what
//! each point changes for itself. The order of precedence is upstream's (`mergePluginSet`, `expandMultiPointPlugins`).

use super::reader::Reader;
use crate::plugins::{PLUGINS, PluginId, Point, plugin_id};
use std::collections::HashMap;

const POINTS: &[(&str, Point)] = &[
    ("preEnqueue", Point::PreEnqueue),
    ("queueSort", Point::QueueSort),
    ("preFilter", Point::PreFilter),
    ("filter", Point::Filter),
    ("postFilter", Point::PostFilter),
    ("preScore", Point::PreScore),
    ("score", Point::Score),
    ("reserve", Point::Reserve),
    ("permit", Point::Permit),
    ("preBind", Point::PreBind),
    ("bind", Point::Bind),
    ("postBind", Point::PostBind),
];

/// What one list says: plugins with their weights (0 if none is given), and those that are switched off.
#[derive(Default)]
struct Set {
    enabled: Vec<(PluginId, i64)>,
    disabled: Vec<String>,
}

impl Set {
    fn disables(&self, plugin: PluginId) -> bool {
        self.disabled.iter().any(|name| name == "*" || name == PLUGINS[plugin].name)
    }
}

pub fn read(profile: &mut Reader) -> HashMap<Point, Vec<(PluginId, i64)>> {
    let (mut multi, mut sets) = (Set::default(), HashMap::new());
    profile.object("plugins", |plugins| {
        multi = read_set(plugins, "multiPoint", None);
        for (name, point) in POINTS {
            sets.insert(*point, read_set(plugins, name, Some(*point)));
        }
        plugins.no_others();
    });
    let everywhere = merge(&multi);
    let mut points: HashMap<Point, Vec<(PluginId, i64)>> = HashMap::new();
    for (_, point) in POINTS {
        points.insert(*point, expand(&everywhere, &sets.remove(point).unwrap_or_default(), *point));
    }
    require(profile, &points);
    points
}

fn read_set(plugins: &mut Reader, name: &str, point: Option<Point>) -> Set {
    let mut set = Set::default();
    plugins.object(name, |reader| {
        let enabled = reader.list("enabled", |entry| {
            let (name, weight) =
                (entry.text("name").unwrap_or_default(), entry.integer("weight").unwrap_or(0));
            let found = plugin_id(&name);
            if found.is_none() {
                entry.error("name", &format!("Invalid value: {name:?}: plugin does not exist"));
            }
            if let (Some(found), Some(point)) = (found, point)
                && !PLUGINS[found].points.contains(&point)
            {
                entry.error(
                    "name",
                    &format!("Invalid value: {name:?}: plugin does not extend {point:?} plugin"),
                );
            }
            entry.no_others();
            found.map(|found| (found, weight))
        });
        set.enabled = enabled.into_iter().flatten().collect();
        for index in 1..set.enabled.len() {
            if set.enabled[..index].iter().any(|(other, _)| *other == set.enabled[index].0) {
                let name = PLUGINS[set.enabled[index].0].name;
                reader.error(&format!("enabled[{index}].name"), &format!("Duplicate value: {name:?}"));
            }
        }
        set.disabled = reader.list("disabled", |entry| {
            let name = entry.text("name").unwrap_or_default();
            entry.accept("weight");
            if name != "*" && plugin_id(&name).is_none() {
                entry.error("name", &format!("Invalid value: {name:?}: plugin does not exist"));
            }
            entry.no_others();
            name
        });
        reader.no_others();
    });
    set
}

/// The default plugins in their order, as changed for all points.
fn merge(multi: &Set) -> Vec<(PluginId, i64)> {
    let own = |id: PluginId| multi.enabled.iter().find(|(other, _)| *other == id).copied();
    let defaults = PLUGINS.iter().enumerate().filter(|(id, _)| !multi.disables(*id));
    let mut merged: Vec<(PluginId, i64)> =
        defaults.map(|(id, plugin)| own(id).unwrap_or((id, plugin.weight))).collect();
    let added: Vec<(PluginId, i64)> = multi
        .enabled
        .iter()
        .filter(|(id, _)| !merged.iter().any(|(other, _)| other == id))
        .copied()
        .collect();
    merged.extend(added);
    merged
}

/// First those that the point itself names among the general ones, then the other general ones, then its own.
fn expand(everywhere: &[(PluginId, i64)], set: &Set, point: Point) -> Vec<(PluginId, i64)> {
    let general = |id: PluginId| everywhere.iter().any(|(other, _)| *other == id);
    let named = |id: PluginId| set.enabled.iter().any(|(other, _)| *other == id);
    let first = set.enabled.iter().filter(|(id, _)| general(*id));
    let others = everywhere
        .iter()
        .filter(|(id, _)| PLUGINS[*id].points.contains(&point) && !named(*id) && !set.disables(*id));
    let own = set.enabled.iter().filter(|(id, _)| !general(*id));
    // Without a weight a score counts once.
    first.chain(others).chain(own).map(|(id, weight)| (*id, (*weight).max(1))).collect()
}

/// What no scheduler can do without.
fn require(profile: &mut Reader, points: &HashMap<Point, Vec<(PluginId, i64)>>) {
    for (name, point, what) in [
        ("queueSort", Point::QueueSort, "one queue sort plugin"),
        ("bind", Point::Bind, "at least one bind plugin"),
    ] {
        if points.get(&point).is_none_or(|plugins| plugins.is_empty()) {
            profile.error(&format!("plugins.{name}"), &format!("Required value: {what} is needed"));
        }
    }
}
