//! The generic registry: create, read, change and delete objects of every kind.
//!
//! What holds for every kind is here, once; what is special comes from the kind's [`Rules`] and from
//! admission. A write is: decode → rules → defaults → admission → validation → ownership → commit. Nothing
//! is stored before everything has passed, and every change names the revision it was made from.

mod deletion;
mod listing;

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use knarr_api::apply::{self, Manager, Reach};
use knarr_api::object::Object;
use knarr_api::rules::{self, Rules};
use knarr_api::schema::{Kind, Schema};
use knarr_api::status::{Result, Status};
use knarr_api::{decode, defaults, patch, time, versions};
use knarr_store::{Entry, Expect, Range, Store, Write, WriteError};
use parking_lot::Mutex;
use rand::Rng;
use serde_json::{Value, json};

pub use deletion::DeleteOptions;
use deletion::is_finished;
pub use listing::{Page, Selection, prefix};

use crate::admission::{self, Operation};
use crate::encode::{self, View};
use crate::health::Health;
use crate::identity::User;
use crate::quota::{self, Quotas};
use crate::rbac::Rbac;
use crate::request::FieldValidation;
use crate::services::{Allocator, Reservation};

/// How often a write without a resourceVersion is retried when others change the object meanwhile.
pub const CONFLICT_RETRIES_MAX: usize = 16;
/// How often a generated name that exists already is drawn again (KEP-4420).
pub const GENERATE_NAME_RETRIES_MAX: usize = 8;

/// Everything a write needs to know beside the object.
pub struct Context {
    pub user: User,
    /// `fieldManager`, or what the user agent calls itself.
    pub manager: String,
    pub dry_run: bool,
    pub validation: FieldValidation,
    /// Sent back as `Warning` headers.
    pub warnings: Mutex<Vec<String>>,
    /// Judges what the user may grant to others; `None` for the server's own writes.
    pub rbac: Option<Rbac>,
    /// The version the request is in, if objects of its kind are stored in another.
    pub served: Option<&'static Kind>,
}

impl Context {
    pub fn new(user: User, manager: impl Into<String>) -> Self {
        Context {
            user,
            manager: manager.into(),
            dry_run: false,
            validation: FieldValidation::Warn,
            warnings: Mutex::default(),
            rbac: None,
            served: None,
        }
    }

    /// The same request, made to see what would happen.
    pub fn dry(&self) -> Context {
        Context {
            user: self.user.clone(),
            manager: self.manager.clone(),
            dry_run: true,
            validation: self.validation,
            warnings: Mutex::default(),
            rbac: self.rbac.clone(),
            served: self.served,
        }
    }

    /// The version in which the request speaks of this kind.
    pub fn version_of<'k>(&self, kind: &'k Kind) -> &'k Kind
    where
        'static: 'k,
    {
        self.served.filter(|served| served.plural == kind.plural).unwrap_or(kind)
    }

    /// The rules for metadata: events of the two groups are one object, but one group is more lenient.
    fn metadata_rules(&self, kind: &Kind) -> &'static Rules {
        let served = self.version_of(kind);
        Rules::of(if served.is_old() { kind } else { served })
    }

    /// Rules that hold beside the stored version's, for who writes through a version with rules of its own. They see
    /// the object as it is stored.
    fn stricter_rules(&self, kind: &Kind) -> Option<&'static Rules> {
        let served = self.served?;
        (!served.is_old() && served.group != kind.group).then(|| Rules::of(served))
    }

    pub fn warn(&self, text: impl Into<String>) {
        let (text, mut warnings) = (text.into(), self.warnings.lock());
        if !warnings.contains(&text) {
            warnings.push(text);
        }
    }
}

/// One object of one kind.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    pub kind: &'a Kind,
    pub namespace: &'a str,
    pub name: &'a str,
}

impl Place<'_> {
    pub fn key(&self) -> String {
        encode::key(self.namespace, self.name)
    }

    pub fn not_found(&self) -> Box<Status> {
        Status::not_found(self.kind, self.name)
    }
}

/// The face of the object a write goes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Endpoint {
    Main,
    Status,
    /// Any other subresource: a [`Face`](rules::Face) of the kind, or one whose code has decided what changes.
    Other(&'static str),
}

impl Endpoint {
    pub fn subresource(&self) -> &'static str {
        match self {
            Endpoint::Main => "",
            Endpoint::Status => "status",
            Endpoint::Other(name) => name,
        }
    }
}

/// How an object is to change.
pub enum Edit<'a> {
    Replace(Value),
    JsonPatch(&'a [u8]),
    MergePatch(&'a [u8]),
    StrategicPatch(&'a [u8]),
    Apply { config: Value, force: bool },
    With(&'a (dyn Fn(&Value) -> Result<Value> + Send + Sync)),
}

impl Edit<'_> {
    /// Whether a patch has to see `managedFields`. JSON may spell the name with escapes; nobody does, and such a
    /// patch finds no owners.
    fn mentions_owners(&self) -> bool {
        const OWNERS: &[u8] = b"managedFields";
        match self {
            Edit::JsonPatch(body) | Edit::MergePatch(body) | Edit::StrategicPatch(body) => {
                body.windows(OWNERS.len()).any(|window| window == OWNERS)
            }
            Edit::Replace(_) | Edit::Apply { .. } | Edit::With(_) => false,
        }
    }

    /// Whether the writer says which version is to be changed. A patch that does not is made again when somebody
    /// else was quicker; all others carry the version they were made from, or none.
    fn names_revision(&self) -> bool {
        const PATH: &str = "/metadata/resourceVersion";
        let tree = |body: &[u8]| serde_json::from_slice::<Value>(body).unwrap_or_default();
        match self {
            Edit::Replace(_) | Edit::With(_) => true,
            Edit::Apply { config, .. } => config.at("metadata.resourceVersion").is_some(),
            Edit::MergePatch(body) | Edit::StrategicPatch(body) => tree(body).pointer(PATH).is_some(),
            Edit::JsonPatch(body) => {
                tree(body).as_array().into_iter().flatten().any(|step| step["path"] == PATH)
            }
        }
    }
}

/// What a write left behind.
#[derive(Debug, Clone)]
pub enum Outcome {
    Stored(Arc<Entry>),
    /// Dry runs, and objects that are no more.
    Shown(Value),
}

impl Outcome {
    pub fn bytes(&self, kind: &Kind) -> Bytes {
        match self {
            Outcome::Stored(entry) => entry.bytes.clone(),
            Outcome::Shown(value) => encode::unstored(kind, value),
        }
    }

    pub fn value(&self) -> Value {
        match self {
            Outcome::Stored(entry) => encode::decode(entry),
            Outcome::Shown(value) => value.clone(),
        }
    }
}

/// The registry of all kinds.
pub struct Registry {
    pub store: Arc<dyn Store>,
    pub schema: &'static Schema,
    pub services: Allocator,
    pub quotas: Quotas,
    pub health: Health,
    /// The time of day; a test or the simulation may pass its own.
    pub clock: Arc<dyn Fn() -> Timestamp + Send + Sync>,
}

impl Registry {
    pub fn now(&self) -> String {
        time::print((self.clock)(), 0)
    }

    /// The object, as stored.
    pub fn get(&self, place: Place) -> Result<Arc<Entry>> {
        self.find(place).ok_or_else(|| place.not_found())
    }

    pub fn find(&self, place: Place) -> Option<Arc<Entry>> {
        self.store.get(&partition(place.kind), &place.key())
    }

    /// The object of a built-in kind, decoded; for admission and subresources.
    pub fn lookup(&self, group: &str, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let partition = if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") };
        self.store.get(&partition, &encode::key(namespace, name)).map(|entry| encode::decode(&entry))
    }

    /// As [`Registry::lookup`], for kinds that many requests ask about and of which there are few: decoded once.
    pub fn policy(&self, partition: &str, namespace: &str, name: &str) -> Option<Arc<Value>> {
        self.store.get(partition, &encode::key(namespace, name)).map(|entry| View::tree(&entry))
    }

    /// All objects of such a kind in a namespace; in all of them, if it is empty.
    pub fn policies(&self, partition: &str, namespace: &str) -> Vec<Arc<Value>> {
        if self.store.count(partition) == 0 {
            return Vec::new();
        }
        let range = Range { prefix: prefix(namespace), ..Range::default() };
        let entries = self.store.list(partition, &range).map(|l| l.entries).unwrap_or_default();
        entries.iter().map(|entry| View::tree(entry)).collect()
    }

    // ---- create ----

    pub async fn create(
        &self,
        kind: &Kind,
        namespace: &str,
        object: Value,
        context: &Context,
    ) -> Result<Outcome> {
        let generated = object.name().is_empty() && !object.str_at("metadata.generateName").is_empty();
        let mut attempt = 0;
        loop {
            let result = self.create_once(kind, namespace, object.clone(), context).await;
            match result {
                Err(status)
                    if generated
                        && status.reason == "AlreadyExists"
                        && attempt < GENERATE_NAME_RETRIES_MAX =>
                {
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    async fn create_once(
        &self,
        kind: &Kind,
        namespace: &str,
        object: Value,
        context: &Context,
    ) -> Result<Outcome> {
        let (object, reservation) = self.prepare_create(kind, namespace, object, context)?;
        let owner = manager(kind, context, Endpoint::Main, false);
        let reach = reach(kind, Endpoint::Main);
        let write = apply::Write { manager: &owner, reach, now: &self.now() };
        let owners = apply::record_update(self.schema, kind.type_id, None, &object, write);
        self.commit_new(kind, (object, &owners), reservation, context).await
    }

    /// Everything a new object goes through before its owners are recorded.
    fn prepare_create(
        &self,
        kind: &Kind,
        namespace: &str,
        mut object: Value,
        context: &Context,
    ) -> Result<(Value, Reservation<'_>)> {
        let rules = Rules::of(kind);
        self.prepare_metadata(kind, namespace, &mut object)?;
        if kind.has_sub("status") {
            object.remove_at("status");
        }
        (rules.create)(&mut object);
        versions::apply_defaults(context.version_of(kind), &mut object);
        defaults::apply(self.schema, kind.type_id, &mut object);
        let place = Place { kind, namespace, name: "" };
        admission::mutate(self, (Operation::Create, Endpoint::Main), place, &mut object, None, context)?;
        (rules.complete)(&mut object);
        let reservation = self.services.reserve(self, kind, &mut object, None)?;
        let mut errors = Vec::new();
        rules::validate_metadata(kind, context.metadata_rules(kind), &object, &mut errors);
        (rules.validate)(&object, &mut errors);
        if let Some(strict) = context.stricter_rules(kind) {
            (strict.validate)(&object, &mut errors);
        }
        if !errors.is_empty() {
            return Err(Status::invalid(kind, object.name(), &errors));
        }
        admission::validate(self, (Operation::Create, Endpoint::Main), place, &object, None, context)?;
        (rules.warnings)(&object).into_iter().for_each(|w| context.warn(w));
        Ok((object, reservation))
    }

    async fn commit_new(
        &self,
        kind: &Kind,
        (object, owners): (Value, &str),
        mut reservation: Reservation<'_>,
        context: &Context,
    ) -> Result<Outcome> {
        let namespace = object.namespace().to_owned();
        let place = Place { kind, namespace: &namespace, name: object.name() };
        let pass = quota::judge(self, place, &object, None).await?;
        if context.dry_run {
            return Ok(Outcome::Shown(with_owners(object, owners)));
        }
        let write = Write {
            partition: partition(kind).into(),
            key: encode::key(object.namespace(), object.name()).into(),
            expect: Expect::Absent,
            change: encode::put(kind, &object, Some(owners)),
        };
        reservation.hold(self, &object).await?;
        let committed = match self.store.commit(write).await {
            Ok(committed) => committed,
            Err(error) => {
                // The object that is in the way may hold the same address.
                reservation.undo(self, &object).await;
                return Err(match error {
                    WriteError::Exists => Status::already_exists(kind, object.name()),
                    other => self.write_failed(&other),
                });
            }
        };
        reservation.keep(self, &object).await;
        quota::settle(self, &namespace, pass).await;
        Ok(Outcome::Stored(committed.entry))
    }

    fn prepare_metadata(&self, kind: &Kind, namespace: &str, object: &mut Value) -> Result<()> {
        if !object.get("metadata").is_some_and(Value::is_object) {
            object["metadata"] = json!({});
        }
        if !object.str_at("metadata.resourceVersion").is_empty() {
            return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
        }
        if kind.namespaced {
            match object.namespace() {
                "" => object.set_at("metadata.namespace", namespace),
                given if given != namespace => {
                    return Err(Status::bad_request(
                        "the namespace of the provided object does not match the namespace sent on the request",
                    ));
                }
                _ => {}
            }
        }
        for name in
            ["selfLink", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "resourceVersion"]
        {
            object.remove_at(&format!("metadata.{name}"));
        }
        object.set_at("metadata.uid", new_uid());
        object.set_at("metadata.creationTimestamp", self.now());
        if Rules::of(kind).generation {
            object.set_at("metadata.generation", 1);
        }
        let base = object.str_at("metadata.generateName").to_owned();
        if object.name().is_empty() && !base.is_empty() {
            object.set_at("metadata.name", generate_name(&base));
        }
        Ok(())
    }

    // ---- change ----

    /// Changes an existing object.
    pub async fn modify(
        &self,
        place: Place<'_>,
        endpoint: Endpoint,
        edit: &Edit<'_>,
        context: &Context,
    ) -> Result<Outcome> {
        for _ in 0..CONFLICT_RETRIES_MAX {
            let entry = self.get(place)?;
            match self.modify_once(place, endpoint, edit, context, &entry).await? {
                Attempt::Done(outcome) => return Ok(outcome),
                Attempt::Raced => {}
            }
        }
        Err(Status::modified(place.kind, place.name))
    }

    /// PUT and apply: also creates, where the kind or the verb allows it.
    pub async fn modify_or_create(
        &self,
        place: Place<'_>,
        edit: Edit<'_>,
        context: &Context,
    ) -> Result<(Outcome, bool)> {
        for _ in 0..CONFLICT_RETRIES_MAX {
            if self.find(place).is_some() {
                match self.modify(place, Endpoint::Main, &edit, context).await {
                    Err(status) if status.reason == "NotFound" => continue,
                    result => return result.map(|outcome| (outcome, false)),
                }
            }
            let created = match &edit {
                Edit::Replace(object) if Rules::of(place.kind).create_on_update => {
                    let mut object = object.clone();
                    check_name(place, &object)?;
                    object.remove_at("metadata.resourceVersion");
                    self.create(place.kind, place.namespace, object, context).await
                }
                Edit::Apply { config, .. } => self.create_applied(place, config, context).await,
                _ => return Err(place.not_found()),
            };
            match created {
                Err(status) if status.reason == "AlreadyExists" => continue,
                result => return result.map(|outcome| (outcome, true)),
            }
        }
        Err(Status::modified(place.kind, place.name))
    }

    /// Changes an object in one of the server's own ways, past admission, validation, generation and ownership, which
    /// are about what clients write; upstream's binding does so too. Tried again when somebody else was faster.
    pub async fn rewrite(
        &self,
        place: Place<'_>,
        change: impl Fn(Value) -> Result<Value>,
        context: &Context,
    ) -> Result<Outcome> {
        for _ in 0..CONFLICT_RETRIES_MAX {
            let entry = self.get(place)?;
            let (object, owners) = encode::apart(place.kind, &entry);
            let new = change(object)?;
            if context.dry_run {
                return Ok(Outcome::Shown(with_owners(new, &owners)));
            }
            let write = Write {
                partition: partition(place.kind).into(),
                key: entry.key.clone(),
                expect: Expect::Revision(entry.revision),
                change: encode::put(place.kind, &new, Some(&owners)),
            };
            match self.store.commit(write).await {
                Ok(committed) => return Ok(Outcome::Stored(committed.entry)),
                Err(WriteError::Changed(_)) => {}
                Err(WriteError::NotFound) => return Err(place.not_found()),
                Err(other) => return Err(self.write_failed(&other)),
            }
        }
        Err(Status::modified(place.kind, place.name))
    }

    async fn create_applied(&self, place: Place<'_>, config: &Value, context: &Context) -> Result<Outcome> {
        if !config.str_at("metadata.resourceVersion").is_empty() || !config.uid().is_empty() {
            return Err(Status::conflict(
                place.kind,
                place.name,
                "StorageError: the object to apply does not exist",
            ));
        }
        let kind = place.kind;
        let mut object = config.clone();
        if object.name().is_empty() {
            object.set_at("metadata.name", place.name);
        }
        check_name(place, &object)?;
        let (object, reservation) = self.prepare_create(kind, place.namespace, object, context)?;
        let owner = manager(kind, context, Endpoint::Main, true);
        let reach = reach(kind, Endpoint::Main);
        let empty = json!({});
        let write = apply::Write { manager: &owner, reach, now: &self.now() };
        let nothing = apply::Live { object: &empty, owners: "" };
        let applied = apply::merge(self.schema, kind.type_id, nothing, config, write, true)?;
        let owners = apply::record_apply(self.schema, kind.type_id, &empty, applied, &object, write);
        self.commit_new(kind, (object, &owners), reservation, context).await
    }

    async fn modify_once(
        &self,
        place: Place<'_>,
        endpoint: Endpoint,
        edit: &Edit<'_>,
        context: &Context,
        entry: &Arc<Entry>,
    ) -> Result<Attempt> {
        let Place { kind, .. } = place;
        let rules = Rules::of(kind);
        let (lean, owned) = encode::apart(kind, entry);
        // Owners are set aside: no step between here and their record looks at them, unless the patch does.
        let old = if edit.mentions_owners() { encode::decode(entry) } else { lean };
        let live = apply::Live { object: &old, owners: &owned };
        let applies = matches!(edit, Edit::Apply { .. });
        let owner = manager(kind, context, endpoint, applies);
        let now = self.now();
        let write = apply::Write { manager: &owner, reach: reach(kind, endpoint), now: &now };
        let mut applied = None;
        let served = context.version_of(kind);
        let mut new = match edit {
            Edit::Replace(object) => object.clone(),
            Edit::JsonPatch(body) => {
                let make = || patch::json(&shown_in(served, &old), body);
                self.decode_patched(kind, make()?, || make().ok().map(|tree| tree.to_string()), context)?
            }
            Edit::MergePatch(body) => {
                let make = || patch::merge(&shown_in(served, &old), body);
                self.decode_patched(kind, make()?, || make().ok().map(|tree| tree.to_string()), context)?
            }
            Edit::StrategicPatch(body) => {
                let shown = shown_in(served, &old);
                let patched = patch::strategic(self.schema, served.type_id, &shown, body)?;
                let sent = || serde_json::from_slice(body).ok().map(|tree| as_go_prints(&tree));
                self.decode_patched(kind, patched, sent, context)?
            }
            Edit::Apply { config, force } => {
                let mut config = config.clone();
                if config.name().is_empty() {
                    config.set_at("metadata.name", place.name);
                }
                let merged = apply::merge(self.schema, kind.type_id, live, &config, write, *force)?;
                let decoded = decode::value(self.schema, kind.type_id, merged.object.clone());
                let object = self.finish_decode(kind, decoded, context)?;
                applied = Some(merged);
                object
            }
            Edit::With(make) => make(&old)?,
        };
        let replaced = matches!(edit, Edit::Replace(_));
        let unconditional =
            self.check_identity(place, &new, &old, rules, replaced)? || !edit.names_revision();
        carry_system_metadata(&mut new, &old);
        match endpoint {
            Endpoint::Main => {
                if kind.has_sub("status") {
                    knarr_api::kinds::core::keep(&mut new, &old, "status");
                }
                (rules.update)(&mut new, &old);
            }
            Endpoint::Status => {
                keep_all_but_status(&mut new, &old);
                (rules.update_status)(&mut new, &old);
            }
            Endpoint::Other(name) => {
                if let Some(face) = rules.face(name) {
                    (face.update)(&mut new, &old);
                }
            }
        }
        versions::apply_defaults(served, &mut new);
        defaults::apply(self.schema, kind.type_id, &mut new);
        admission::mutate(self, (Operation::Update, endpoint), place, &mut new, Some(&old), context)?;
        let mut reservation = match endpoint {
            Endpoint::Main => self.services.reserve(self, kind, &mut new, Some(&old))?,
            _ => self.services.nothing(),
        };
        let mut errors = Vec::new();
        rules::validate_metadata(kind, context.metadata_rules(kind), &new, &mut errors);
        rules::validate_metadata_update(&new, &old, &mut errors);
        match endpoint {
            Endpoint::Main => {
                (rules.validate)(&new, &mut errors);
                (rules.validate_update)(&new, &old, &mut errors);
                if let Some(strict) = context.stricter_rules(kind) {
                    (strict.validate_update)(&new, &old, &mut errors);
                }
            }
            Endpoint::Status => (rules.validate_status)(&new, &old, &mut errors),
            Endpoint::Other(name) => {
                if let Some(face) = rules.face(name) {
                    (face.validate)(&new, &old, &mut errors);
                }
            }
        }
        if !errors.is_empty() {
            return Err(Status::invalid(kind, place.name, &errors));
        }
        admission::validate(self, (Operation::Update, endpoint), place, &new, Some(&old), context)?;
        if endpoint == Endpoint::Main {
            (rules.warnings)(&new).into_iter().for_each(|w| context.warn(w));
        }
        if rules.generation && changes_beyond_metadata_and_status(&new, &old) {
            new.set_at("metadata.generation", old.int_at("metadata.generation").unwrap_or(0) + 1);
        }
        let owners = match applied {
            Some(applied) => apply::record_apply(self.schema, kind.type_id, &old, applied, &new, write),
            None => apply::record_update(self.schema, kind.type_id, Some(live), &new, write),
        };
        if same_but_for_times(&new, &owners, live) {
            return Ok(Attempt::Done(Outcome::Stored(entry.clone())));
        }
        let pass = match endpoint {
            Endpoint::Main | Endpoint::Other("resize") => {
                Some(quota::judge(self, place, &new, Some(&old)).await?)
            }
            _ => None,
        };
        if context.dry_run {
            return Ok(Attempt::Done(Outcome::Shown(with_owners(new, &owners))));
        }
        reservation.hold(self, &new).await?;
        let written = if is_finished(&new) {
            self.remove(kind, entry, &new, Some(&owners)).await
        } else {
            let write = Write {
                partition: partition(kind).into(),
                key: entry.key.clone(),
                expect: Expect::Revision(entry.revision),
                change: encode::put(kind, &new, Some(&owners)),
            };
            self.store.commit(write).await
        };
        match written {
            Ok(committed) => {
                reservation.keep(self, &new).await;
                match pass {
                    Some(pass) => quota::settle(self, place.namespace, pass).await,
                    // A pod that ends frees what it used.
                    None if quota::usage(kind, &new) != quota::usage(kind, &old) => {
                        quota::released(self, place.namespace).await;
                    }
                    None => {}
                }
                Ok(Attempt::Done(Outcome::Stored(committed.entry)))
            }
            Err(error) => {
                reservation.undo(self, &new).await;
                match error {
                    WriteError::Changed(_) | WriteError::NotFound if unconditional => Ok(Attempt::Raced),
                    WriteError::Changed(_) => Err(Status::modified(kind, place.name)),
                    WriteError::NotFound => Err(place.not_found()),
                    other => Err(self.write_failed(&other)),
                }
            }
        }
    }

    /// A patched tree is decoded like a body: types are checked, unknown fields dropped. What is wrong then is the
    /// patch's fault: `shown` is what the message shows of it.
    fn decode_patched(
        &self,
        kind: &Kind,
        tree: Value,
        shown: impl FnOnce() -> Option<String>,
        context: &Context,
    ) -> Result<Value> {
        self.decode(kind, tree, context).map_err(|status| {
            let name = &context.version_of(kind).kind;
            match status.message.split_once(&format!("cannot be handled as a {name}: ")) {
                Some((_, why)) if !why.starts_with("no kind") && !why.starts_with("converting") => {
                    Status::invalid_patch(&shown().unwrap_or_default(), why)
                }
                _ => status,
            }
        })
    }

    /// Decodes a tree as the kind, in the version of the request, judging unknown fields as the request asks.
    /// The result is in the stored version.
    pub fn decode(&self, kind: &Kind, tree: Value, context: &Context) -> Result<Value> {
        let served = context.version_of(kind);
        check_type(served, &tree)?;
        let decoded = decode::value(self.schema, served.type_id, tree);
        let mut value = self.finish_decode(served, decoded, context)?;
        versions::to_hub(self.schema, served, &mut value);
        Ok(value)
    }

    /// Paths of fields the kind does not have.
    pub fn unknown_fields(&self, kind: &Kind, tree: &Value) -> Vec<String> {
        let decoded = decode::value(self.schema, kind.type_id, tree.clone());
        let issues = decoded.map(|d| d.issues).unwrap_or_default().into_iter();
        issues
            .filter_map(|i| Some(i.strip_prefix("unknown field \"")?.trim_end_matches('"').to_owned()))
            .collect()
    }

    /// Decodes JSON bytes as the kind.
    pub fn decode_json(&self, kind: &Kind, bytes: &[u8], context: &Context) -> Result<Value> {
        let served = context.version_of(kind);
        let decoded = decode::json(self.schema, served.type_id, bytes);
        let mut value = self.finish_decode(served, decoded, context)?;
        check_type(served, &value)?;
        versions::to_hub(self.schema, served, &mut value);
        Ok(value)
    }

    fn finish_decode(
        &self,
        kind: &Kind,
        decoded: std::result::Result<decode::Decoded, decode::DecodeError>,
        context: &Context,
    ) -> Result<Value> {
        let about = |why: &str| {
            format!("{} in version {:?} cannot be handled as a {}: {why}", kind.kind, kind.version, kind.kind)
        };
        let decoded = decoded.map_err(|error| Status::bad_request(about(&error.0)))?;
        match context.validation {
            FieldValidation::Strict if !decoded.issues.is_empty() => {
                let list = decoded.issues.join(", ");
                return Err(Status::bad_request(about(&format!("strict decoding error: {list}"))));
            }
            FieldValidation::Warn => decoded.issues.iter().for_each(|issue| context.warn(issue.as_str())),
            _ => {}
        }
        let mut value = decoded.value;
        if !value.is_object() {
            return Err(Status::bad_request(about("the body is no object")));
        }
        value["kind"] = match value.str_at("kind") {
            "" => json!(kind.kind),
            given => json!(given),
        };
        if value.str_at("apiVersion").is_empty() {
            value["apiVersion"] = json!(kind.api_version());
        }
        Ok(value)
    }

    /// Names, uid and resourceVersion must be those of the stored object; true if no revision was named.
    fn check_identity(
        &self,
        place: Place,
        new: &Value,
        old: &Value,
        rules: &Rules,
        replaced: bool,
    ) -> Result<bool> {
        check_name(place, new)?;
        // A replacement's uid is a precondition; a patched uid is a field that may not change.
        if replaced && !new.uid().is_empty() && new.uid() != old.uid() {
            let why = format!(
                "Precondition failed: UID in precondition: {}, UID in object meta: {}",
                new.uid(),
                old.uid()
            );
            return Err(Status::conflict(place.kind, place.name, why));
        }
        match new.str_at("metadata.resourceVersion") {
            "" if rules.needs_revision => {
                let error = knarr_api::field::Error::invalid(
                    "metadata.resourceVersion",
                    0,
                    "must be specified for an update",
                );
                Err(Status::invalid(place.kind, place.name, &[error]))
            }
            "" => Ok(true),
            given if given == old.str_at("metadata.resourceVersion") => Ok(false),
            _ => Err(Status::modified(place.kind, place.name)),
        }
    }

    /// What a failed commit means for the client. The disk's complaint is worth telling.
    pub fn write_failed(&self, error: &WriteError) -> Box<Status> {
        match error {
            WriteError::Closed => Status::service_unavailable("the server is shutting down"),
            other => {
                if let WriteError::Disk(why) = other {
                    self.health.store_failed(why);
                }
                Status::internal(other)
            }
        }
    }
}

enum Attempt {
    Done(Outcome),
    /// Somebody else was faster; read again.
    Raced,
}

/// Where a kind's objects are kept; the kind is the stored version.
pub fn partition(kind: &Kind) -> String {
    kind.resource()
}

/// A value as Go prints the maps it decodes patches to: `map[spec:map[replicas:1]]`.
fn as_go_prints(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => format!("[{}]", items.iter().map(as_go_prints).collect::<Vec<_>>().join(" ")),
        Value::Object(map) => {
            let mut entries: Vec<String> =
                map.iter().map(|(k, v)| format!("{k}:{}", as_go_prints(v))).collect();
            entries.sort();
            format!("map[{}]", entries.join(" "))
        }
        other => other.to_string(),
    }
}

/// The object as the version of the request shows it.
fn shown_in<'o>(served: &Kind, object: &'o Value) -> Cow<'o, Value> {
    if served.conversion.is_none() {
        return Cow::Borrowed(object);
    }
    let mut shown = object.clone();
    versions::from_hub(served, &mut shown);
    Cow::Owned(shown)
}

fn manager(kind: &Kind, context: &Context, endpoint: Endpoint, applies: bool) -> Manager {
    Manager {
        applies,
        name: context.manager.clone(),
        api_version: context.version_of(kind).api_version(),
        subresource: endpoint.subresource().to_owned(),
    }
}

/// The fields that a writer to the endpoint comes to own.
fn reach(kind: &Kind, endpoint: Endpoint) -> Reach<'static> {
    match endpoint {
        Endpoint::Main if kind.has_sub("status") => Reach::AllBut(&["status"]),
        Endpoint::Main => Reach::AllBut(&[]),
        Endpoint::Status => {
            Reach::AllBut(&["spec", "metadata.deletionTimestamp", "metadata.ownerReferences"])
        }
        Endpoint::Other("scale") => Reach::Only(&["spec.replicas"]),
        Endpoint::Other(name) => Rules::of(kind).face(name).map_or(Reach::AllBut(&[]), |face| face.reach),
    }
}

/// 16 random bytes as a version 4 UUID.
pub fn new_uid() -> String {
    let (high, low): (u64, u64) = rand::rng().random();
    let (a, b, c) = (high >> 32, high >> 16 & 0xffff, high & 0x0fff | 0x4000);
    let (d, e) = (low >> 48 & 0x3fff | 0x8000, low & 0xffff_ffff_ffff);
    format!("{a:08x}-{b:04x}-{c:04x}-{d:04x}-{e:012x}")
}

/// The base and five random characters that spell no words, within 63 in all.
pub fn generate_name(base: &str) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut random = rand::rng();
    let suffix: String = (0..5).map(|_| ALPHABET[random.random_range(0..ALPHABET.len())] as char).collect();
    let base: String = base.chars().take(58).collect();
    format!("{base}{suffix}")
}

fn check_type(kind: &Kind, object: &Value) -> Result<()> {
    let (version, name) = (object.str_at("apiVersion"), object.str_at("kind"));
    let expected = kind.api_version();
    let version = if version.is_empty() { expected.as_str() } else { version };
    let name = if name.is_empty() { kind.kind.as_str() } else { name };
    if version == expected && name == kind.kind {
        return Ok(());
    }
    let (group, bare) = version.split_once('/').unwrap_or(("", version));
    if Schema::builtin().any_kind(group, bare, name).is_none() {
        return Err(Status::bad_request(format!(
            "{name} in version {bare:?} cannot be handled as a {}: no kind {name:?} is registered for version {version:?} in scheme \"pkg/api/legacyscheme/scheme.go:30\"",
            kind.kind
        )));
    }
    if version != expected {
        return Err(Status::bad_request(format!(
            "the API version in the data ({version}) does not match the expected API version ({expected})"
        )));
    }
    Err(Status::bad_request(format!(
        "{name} in version {bare:?} cannot be handled as a {}: converting ({bare}.{name}) to ({}): unknown conversion",
        kind.kind, kind.kind
    )))
}

fn check_name(place: Place, object: &Value) -> Result<()> {
    if object.name().is_empty() {
        return Err(Status::bad_request("name must be provided"));
    }
    if object.name() != place.name {
        return Err(Status::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({})",
            object.name(),
            place.name
        )));
    }
    if place.kind.namespaced && !object.namespace().is_empty() && object.namespace() != place.namespace {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

/// System fields are the server's; what the client sends for them does not count.
fn carry_system_metadata(new: &mut Value, old: &Value) {
    if !new.get("metadata").is_some_and(Value::is_object) {
        new["metadata"] = json!({});
    }
    for name in [
        "namespace",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "resourceVersion",
        "selfLink",
    ] {
        knarr_api::kinds::core::keep(new, old, &format!("metadata.{name}"));
    }
    if new.uid().is_empty() {
        knarr_api::kinds::core::keep(new, old, "metadata.uid");
    }
    // `managedFields: [{}]` asks for a reset and is understood later; anything else is the server's.
    let reset = matches!(new.list_at("metadata.managedFields"), [one] if one.as_object().is_some_and(|m| m.is_empty()));
    if !reset {
        knarr_api::kinds::core::keep(new, old, "metadata.managedFields");
    }
}

/// Status writers change status, labels, annotations and finalizers at most.
fn keep_all_but_status(new: &mut Value, old: &Value) {
    let status = new.remove_at("status");
    let metadata = new.remove_at("metadata");
    *new = old.clone();
    match status {
        Some(status) => new["status"] = status,
        None => drop(new.remove_at("status")),
    }
    if let Some(metadata) = metadata {
        for name in ["labels", "annotations", "finalizers"] {
            match metadata.get(name) {
                Some(value) => new["metadata"][name] = value.clone(),
                None => drop(new.remove_at(&format!("metadata.{name}"))),
            }
        }
    }
}

fn changes_beyond_metadata_and_status(new: &Value, old: &Value) -> bool {
    let (Some(new), Some(old)) = (new.as_object(), old.as_object()) else { return true };
    let counts = |name: &&String| !matches!(name.as_str(), "metadata" | "status" | "kind" | "apiVersion");
    new.keys().chain(old.keys()).filter(counts).any(|name| new.get(name) != old.get(name))
}

/// Nothing to write: equal but for the times in `managedFields`; the new ones are `owners`.
fn same_but_for_times(new: &Value, owners: &str, live: apply::Live) -> bool {
    let old = live.object;
    let (Some(new_map), Some(old_map)) = (new.as_object(), old.as_object()) else { return false };
    let same_body = new_map.len() == old_map.len()
        && new_map.iter().all(|(name, value)| name == "metadata" || old_map.get(name) == Some(value));
    if !same_body {
        return false;
    }
    let (Some(a), Some(b)) = (new.map_at("metadata"), old.map_at("metadata")) else { return false };
    let keys = a.keys().chain(b.keys()).filter(|k| *k != "managedFields");
    if !keys.into_iter().all(|k| a.get(k) == b.get(k)) {
        return false;
    }
    let timeless = |owners: &str| -> Vec<Value> {
        let mut owners: Vec<Value> = serde_json::from_str(owners).unwrap_or_default();
        owners.iter_mut().for_each(|o| drop(o.remove_at("time")));
        owners
    };
    timeless(owners) == timeless(live.owners)
}

/// The object as it would be stored: for answers to dry runs.
fn with_owners(mut object: Value, owners: &str) -> Value {
    match serde_json::from_str::<Value>(owners) {
        Ok(owners) => object.set_at("metadata.managedFields", owners),
        Err(_) => drop(object.remove_at("metadata.managedFields")),
    }
    object
}
