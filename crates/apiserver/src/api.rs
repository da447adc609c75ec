//! One request from start to end: who asks, what for, may they, then the registry, then the answer.

use std::sync::Arc;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, header};
use http_body_util::{BodyExt, Limited};
use knarr_api::columns::Clock;
use knarr_api::field;
use knarr_api::object::Object;
use knarr_api::schema::Kind;
use knarr_api::status::{Result, Status};
use knarr_api::{decode, protobuf, versions};
use knarr_store::{Range, ReadError};
use serde_json::{Value, json};

use crate::authn::{self, Tokens};
use crate::discovery::Catalog;
use crate::identity::User;
use crate::metrics::{self, metrics};
use crate::proxy::Dialer;
use crate::rbac::{Action, Rbac};
use crate::registry::{Context, DeleteOptions, Edit, Endpoint, Outcome, Page, Place, Registry, Selection};
use crate::request::{Query, RequestInfo, Target};
use crate::respond::{self, Answer, Body, Form, Shape, WithoutOwners};
use crate::{compress, discovery, health, openapi, reviews, subresources, watch, wire};

/// Larger bodies are refused with 413; upstream's limit.
pub const BODY_BYTES_MAX: usize = 3 << 20;

/// The API server, whatever carries its requests.
pub struct Api {
    pub registry: Arc<Registry>,
    pub rbac: Rbac,
    pub tokens: Arc<Tokens>,
    pub dialer: Dialer,
    /// `host:port` that clients reach the server at.
    pub address: String,
    /// Serve the versions that upstream has removed, as older manifests and books use them.
    pub old_versions: bool,
}

/// Who is at the other end of the connection.
#[derive(Debug, Clone)]
pub enum Peer {
    /// A network client, with the user of its certificate if it showed one.
    Remote(Option<User>),
    /// A loop of this process.
    InProcess(User),
}

/// A request on its way through.
struct Call<'a> {
    info: &'a RequestInfo,
    target: &'a Target,
    /// The kind in the version that is stored.
    kind: &'static Kind,
    /// The kind in the version that is asked for.
    served: &'static Kind,
    headers: HeaderMap,
    form: Form,
    context: Context,
}

impl Call<'_> {
    fn query(&self) -> &Query {
        &self.info.query
    }

    fn place(&self) -> Place<'_> {
        Place { kind: self.kind, namespace: self.namespace(), name: &self.target.name }
    }

    /// Empty for cluster-scoped kinds, even where the path has the object's own name as namespace.
    fn namespace(&self) -> &str {
        if self.kind.namespaced { &self.target.namespace } else { "" }
    }
}

impl Api {
    /// Answers a request; never fails, an error is an answer too.
    pub async fn handle(&self, request: Request<Body>, peer: &Peer) -> Answer {
        let info = RequestInfo::parse(request.method(), request.uri());
        let packed = compress::is_wanted(request.headers());
        let apply = media_type(request.headers()).starts_with("application/apply-patch");
        let started = Instant::now();
        let in_flight = metrics().begin(&info);
        let answer = self.answer(request, &info, peer).await;
        drop(in_flight);
        let answer = self.count(&info, apply, started, answer);
        if packed { compress::answer(answer) } else { answer }
    }

    async fn answer(&self, request: Request<Body>, info: &RequestInfo, peer: &Peer) -> Answer {
        let form = Form::negotiate(request.headers(), &info.query, info.verb == "watch");
        let fallback = form.clone().unwrap_or(Form::JSON);
        let fallback = Form { shape: Shape::Whole, ..fallback };
        let result = self.admit(request, info, form, peer).await;
        result.unwrap_or_else(|status| respond::refuse(&status, &fallback))
    }

    /// Counts the request, if it was about a resource there is.
    fn count(&self, info: &RequestInfo, apply: bool, started: Instant, answer: Answer) -> Answer {
        let Some(target) = &info.target else { return answer };
        let kind = self.catalog().resource(&target.group, &target.version, &target.resource);
        let known = kind.is_some_and(|k| target.subresource.is_empty() || k.has_sub(&target.subresource));
        if !known {
            return answer;
        }
        let labels = metrics::labels(info, target, apply);
        let long = metrics::is_long_running(info);
        metrics().finish(&labels, answer.status().as_u16(), (!long).then(|| started.elapsed()));
        if long && info.verb == "watch" { metrics().hold_open(&labels, answer) } else { answer }
    }

    async fn admit(
        &self,
        request: Request<Body>,
        info: &RequestInfo,
        form: Result<Form>,
        peer: &Peer,
    ) -> Result<Answer> {
        let user = match peer {
            Peer::InProcess(user) => user.clone(),
            Peer::Remote(certificate) => {
                let user = authn::authenticate(
                    request.headers(),
                    certificate.as_ref(),
                    &self.tokens,
                    &self.registry,
                )?;
                self.impersonate(user, request.headers())?
            }
        };
        self.authorize(&user, info)?;
        match &info.target {
            None => self.path(request, info, form),
            Some(target) => self.resource(request, info, target, form, user).await,
        }
    }

    /// `Impersonate-User`, `-Group`, `-Uid` and `-Extra-*`, for those who may: each is asked for on its own.
    fn impersonate(&self, user: User, headers: &HeaderMap) -> Result<User> {
        const EXTRA: &str = "impersonate-extra-";
        let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let mut wanted = User { name: text("impersonate-user").to_owned(), ..User::default() };
        let values = headers.get_all("impersonate-group").iter();
        wanted.groups = values.filter_map(|v| v.to_str().ok().map(str::to_owned)).collect();
        wanted.uid = text("impersonate-uid").to_owned();
        for (name, value) in headers {
            let Some(key) = name.as_str().strip_prefix(EXTRA) else { continue };
            let (key, value) = (percent_decode(key), value.to_str().unwrap_or_default().to_owned());
            match wanted.extra.iter_mut().find(|(k, _)| *k == key) {
                Some((_, values)) => values.push(value),
                None => wanted.extra.push((key, vec![value])),
            }
        }
        if wanted.name.is_empty() {
            if wanted == User::default() {
                return Ok(user);
            }
            return Err(Status::internal("requested impersonation without impersonating a user"));
        }
        self.may_impersonate(&user, &wanted)?;
        if let Some((namespace, account)) = account_of(&wanted.name)
            && wanted.groups.is_empty()
        {
            wanted.groups = User::service_account(namespace, account, "").groups;
        }
        let known = [crate::identity::AUTHENTICATED, crate::identity::UNAUTHENTICATED];
        if !wanted.groups.iter().any(|g| known.contains(&g.as_str())) {
            let anonymous = wanted.name == User::anonymous().name;
            wanted.groups.push(known[usize::from(anonymous)].to_owned());
        }
        Ok(wanted)
    }

    fn may_impersonate(&self, user: &User, wanted: &User) -> Result<()> {
        const AUTHENTICATION: &str = "authentication.k8s.io";
        let ask = |group, resource, subresource: &str, namespace: &str, name: &str| {
            let action =
                Action { verb: "impersonate", group, resource, subresource, namespace, name, path: None };
            if self.rbac.allows(user, &action) { Ok(()) } else { Err(action.forbidden(user)) }
        };
        match account_of(&wanted.name) {
            Some((namespace, account)) => ask("", "serviceaccounts", "", namespace, account)?,
            None => ask("", "users", "", "", &wanted.name)?,
        }
        for group in &wanted.groups {
            ask("", "groups", "", "", group)?;
        }
        if !wanted.uid.is_empty() {
            ask(AUTHENTICATION, "uids", "", "", &wanted.uid)?;
        }
        for (key, values) in &wanted.extra {
            for value in values {
                ask(AUTHENTICATION, "userextras", key, "", value)?;
            }
        }
        Ok(())
    }

    fn authorize(&self, user: &User, info: &RequestInfo) -> Result<()> {
        let verb = if info.verb.is_empty() { "get" } else { info.verb };
        let empty =
            Action { verb, group: "", resource: "", subresource: "", namespace: "", name: "", path: None };
        let selected = self.selected_name(info);
        let action = match &info.target {
            None => Action { path: Some(&info.path), ..empty },
            Some(t) => Action {
                verb: info.verb,
                group: &t.group,
                resource: &t.resource,
                subresource: &t.subresource,
                namespace: &t.namespace,
                name: if t.name.is_empty() { &selected } else { &t.name },
                path: None,
            },
        };
        if self.rbac.allows(user, &action) {
            return Ok(());
        }
        let action = Action { name: info.target.as_ref().map_or("", |t| &t.name), ..action };
        Err(action.forbidden(user))
    }

    /// Lists and watches of one name are allowed to who may see that object alone.
    fn selected_name(&self, info: &RequestInfo) -> String {
        let one = matches!(info.verb, "list" | "watch" | "deletecollection");
        let fields = info.query.field_selector().ok().filter(|_| one);
        fields.and_then(|f| f.exact("metadata.name").map(str::to_owned)).unwrap_or_default()
    }

    /// Everything that is served.
    fn catalog(&self) -> Catalog {
        Catalog { schema: self.registry.schema, old: self.old_versions }
    }

    // ---- paths that are no resource ----

    fn path(&self, request: Request<Body>, info: &RequestInfo, form: Result<Form>) -> Result<Answer> {
        let catalog = self.catalog();
        let accept = request.headers().get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let segments: Vec<&str> = info.path.split('/').filter(|s| !s.is_empty()).collect();
        let aggregated = aggregated_version(accept);
        let value = match (&segments[..], aggregated) {
            (["healthz" | "livez" | "readyz", check @ ..], _) => {
                return Ok(health::answer(&self.registry.health, segments[0], check, &info.query));
            }
            (["version"], _) => version(),
            (["metrics"], _) => return Ok(respond::text(200, self.metrics())),
            (["api"], Some(version)) => {
                return Ok(aggregated_answer(catalog, true, version, request.headers()));
            }
            (["apis"], Some(version)) => {
                return Ok(aggregated_answer(catalog, false, version, request.headers()));
            }
            (["api"], None) => discovery::core_versions(&self.address),
            (["apis"], None) => discovery::group_list(catalog),
            (["apis", group], _) => discovery::group(catalog, group).ok_or_else(Status::no_such_resource)?,
            (["api", version], _) => {
                discovery::resource_list(catalog, "", version).ok_or_else(Status::no_such_resource)?
            }
            (["apis", group, version], _) => {
                discovery::resource_list(catalog, group, version).ok_or_else(Status::no_such_resource)?
            }
            (["openapi", "v2"], _) => return Ok(openapi::serve::v2(catalog, request.headers())),
            (["openapi", "v3"], _) => openapi::v3_index(catalog),
            (["openapi", "v3", rest @ ..], _) => {
                return openapi::serve::v3(catalog, &rest.join("/"), request.headers(), &info.query);
            }
            ([".well-known", "openid-configuration"], _) => json!({
                "issuer": self.tokens.issuer(),
                "jwks_uri": format!("https://{}/openid/v1/jwks", self.address),
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
            }),
            (["openid", "v1", "jwks"], _) => return Ok(key_set(&self.tokens)),
            ([], _) => {
                json!({ "paths": ["/api", "/api/v1", "/apis", "/healthz", "/livez", "/metrics", "/openapi/v2", "/openapi/v3", "/openid/v1/jwks", "/readyz", "/version"] })
            }
            _ => return Err(Status::no_such_resource()),
        };
        let form = Form { shape: Shape::Whole, ..form.unwrap_or(Form::JSON) };
        Ok(respond::value(200, &value, &form))
    }

    /// What requests did, and counts of stored objects, under upstream's names.
    fn metrics(&self) -> String {
        let mut text = metrics().print();
        let name = "apiserver_storage_objects";
        metrics::heading(&mut text, name, "gauge", "Stored objects by kind.");
        for kind in self.registry.schema.kinds().iter().filter(|k| !k.create_only) {
            let count = self.registry.store.count(&crate::registry::partition(kind));
            metrics::line(&mut text, name, &format!("resource=\"{}\"", kind.resource()), count);
        }
        text
    }

    // ---- resources ----

    async fn resource(
        &self,
        request: Request<Body>,
        info: &RequestInfo,
        target: &Target,
        form: Result<Form>,
        user: User,
    ) -> Result<Answer> {
        let served = self.catalog().resource(&target.group, &target.version, &target.resource);
        let served = served.ok_or_else(Status::no_such_resource)?;
        let kind = self.registry.schema.hub(served);
        if !target.subresource.is_empty() && !served.has_sub(&target.subresource) {
            return Err(Status::no_such_resource());
        }
        match target.subresource.as_str() {
            "exec" | "attach" | "portforward" | "log" => {
                return self.dialer.pod_stream(&self.registry, target, &info.query, request).await;
            }
            "proxy" => return self.dialer.proxy(&self.registry, target, request).await,
            _ => {}
        }
        let (parts, body) = request.into_parts();
        let converted = served.conversion.is_some().then_some(served);
        let owners = parts.extensions.get::<WithoutOwners>().is_none();
        let form = Form { version: converted, owners, ..form? };
        let mut context = Context::new(user, field_manager(&parts.headers, &info.query));
        context.rbac = Some(self.rbac.clone());
        context.dry_run = info.query.dry_run()?;
        context.validation = info.query.field_validation()?;
        context.served = converted;
        versions::warning(served).into_iter().for_each(|text| context.warn(text));
        let call = Call { info, target, kind, served, headers: parts.headers, form, context };
        let body = match info.verb {
            "get" | "list" | "watch" => Bytes::new(),
            _ => read_body(body).await?,
        };
        let answer = self.dispatch(&call, &parts.method, body).await;
        let warnings = std::mem::take(&mut *call.context.warnings.lock());
        let fallback = Form { shape: Shape::Whole, ..call.form.clone() };
        let mut answer = answer.unwrap_or_else(|mut status| {
            in_words_of(&mut status, call.kind, call.served);
            respond::refuse(&status, &fallback)
        });
        for text in warnings {
            let value = format!("299 - {:?}", text.replace('\n', " "));
            if let Ok(value) = HeaderValue::from_str(&value) {
                answer.headers_mut().append(header::WARNING, value);
            }
        }
        Ok(answer)
    }

    async fn dispatch(&self, call: &Call<'_>, method: &Method, body: Bytes) -> Result<Answer> {
        match (call.info.verb, call.target.subresource.as_str()) {
            (verb, "") if call.kind.create_only && verb != "create" => {
                Err(Status::method_not_allowed(call.kind, verb))
            }
            ("get" | "list", "") if call.kind.kind == "ComponentStatus" => self.component_statuses(call),
            ("watch", "") if call.kind.kind == "ComponentStatus" => {
                Err(Status::method_not_allowed(call.kind, "watch"))
            }
            ("get", "" | "status") => self.get(call),
            ("list", "") => self.list(call),
            ("watch", "") => self.watch(call),
            ("create", "") if call.kind.create_only => self.review(call, &body).await,
            ("create", "") if call.target.name.is_empty() => self.create(call, &body).await,
            ("update", "") => self.update(call, Endpoint::Main, &body).await,
            ("update", "status") => self.update(call, Endpoint::Status, &body).await,
            ("patch", "") => self.patch(call, Endpoint::Main, &body).await,
            ("patch", "status") => self.patch(call, Endpoint::Status, &body).await,
            ("delete", "") => self.delete(call, &body).await,
            ("deletecollection", "") => self.delete_collection(call, &body).await,
            ("get", "scale") => {
                let object = self.registry.get(call.place())?;
                self.show(call, 200, &subresources::scale_of(&crate::encode::decode(&object)))
            }
            ("update" | "patch", "scale") => self.scale(call, &body).await,
            ("create", "binding") => {
                let binding = self.tree(&call.headers, &body)?;
                let value = subresources::bind(&self.registry, call.place(), &binding, &call.context).await?;
                self.show(call, 201, &value)
            }
            ("create", "eviction") => {
                let eviction = self.tree(&call.headers, &body)?;
                let value =
                    subresources::evict(&self.registry, call.place(), &eviction, &call.context).await?;
                self.show(call, 201, &value)
            }
            ("create", "token") => {
                let request = self.tree(&call.headers, &body)?;
                crate::node::restrict_token(&self.registry, call.place(), &request, &call.context.user)?;
                let value =
                    subresources::token(&self.registry, &self.tokens, call.place(), &request, &call.context)?;
                self.show(call, 201, &value)
            }
            ("update", "finalize") => {
                let object = self.decode_body(call, &body)?;
                let outcome =
                    subresources::finalize(&self.registry, call.place(), &object, &call.context).await?;
                Ok(self.outcome(call, 200, &outcome))
            }
            (verb, name) => {
                if let Some(face) = knarr_api::rules::Rules::of(call.kind).face(name) {
                    match verb {
                        "get" => return self.get(call),
                        "update" => return self.update(call, Endpoint::Other(face.name), &body).await,
                        "patch" => return self.patch(call, Endpoint::Other(face.name), &body).await,
                        _ => {}
                    }
                }
                let verb = if call.info.verb.is_empty() { method.as_str() } else { call.info.verb };
                Err(Status::method_not_allowed(call.kind, verb))
            }
        }
    }

    fn clock(&self) -> Clock {
        Clock { now: (self.registry.clock)() }
    }

    /// A made-up object: never the stored form.
    fn show(&self, call: &Call, code: u16, value: &Value) -> Result<Answer> {
        let form = Form { shape: Shape::Whole, ..call.form.clone() };
        Ok(respond::value(code, value, &form))
    }

    fn outcome(&self, call: &Call, code: u16, outcome: &Outcome) -> Answer {
        respond::object(code, call.kind, &outcome.bytes(call.kind), &call.form, self.clock())
    }

    fn get(&self, call: &Call) -> Result<Answer> {
        let wanted = call.query().get("resourceVersion").and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
        let newest = self.registry.store.revision();
        if wanted > newest {
            return Err(watch::read_failed(&ReadError::Future { requested: wanted, newest }));
        }
        let entry = self.registry.get(call.place())?;
        Ok(respond::object(200, call.kind, &entry.bytes, &call.form, self.clock()))
    }

    fn selection(&self, call: &Call) -> Result<Selection> {
        let fields = call.query().field_selector()?;
        let rules = knarr_api::rules::Rules::of(call.kind);
        for term in &fields.terms {
            if !rules.is_selectable(&term.field) {
                let field = &term.field;
                let text = match call.kind.plural.as_str() {
                    _ if rules.selectable.is_empty() => format!(
                        "{field:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
                    ),
                    "jobs" => format!("field label {field:?} not supported for Job"),
                    _ => format!("field label not supported: {field}"),
                };
                return Err(Status::bad_request(text));
            }
        }
        Ok(Selection { labels: call.query().label_selector()?, fields })
    }

    /// Made up anew for each request: nothing is stored.
    fn component_statuses(&self, call: &Call) -> Result<Answer> {
        let all = self.registry.health.components();
        if call.info.verb == "get" {
            let one = all.into_iter().find(|c| c.name() == call.target.name);
            let one = one.ok_or_else(|| call.place().not_found())?;
            let bytes = crate::encode::unstored(call.kind, &one);
            return Ok(respond::object(200, call.kind, &bytes, &call.form, self.clock()));
        }
        let selection = self.selection(call)?;
        let matches = |c: &&Value| {
            selection.labels.matches(c.map_at("metadata.labels"))
                && selection.fields.exact("metadata.name").is_none_or(|name| name == c.name())
        };
        let items: Vec<Bytes> =
            all.iter().filter(matches).map(|c| crate::encode::unstored(call.kind, c)).collect();
        Ok(respond::list(call.kind, json!({}), &items, &call.form, self.clock()))
    }

    fn list(&self, call: &Call) -> Result<Answer> {
        let page = self.page(call)?;
        let metadata = page_metadata(&page);
        let items: Vec<Bytes> = page.entries.iter().map(|e| e.bytes.clone()).collect();
        Ok(respond::list(call.kind, metadata, &items, &call.form, self.clock()))
    }

    /// The page that a list or a deletion of a collection asks for.
    fn page(&self, call: &Call) -> Result<Page> {
        let query = call.query();
        check_list_options(query)?;
        let selection = self.selection(call)?;
        let mut range =
            Range { limit: query.number("limit")?.unwrap_or(0).max(0) as usize, ..Range::default() };
        let version = query.get("resourceVersion").unwrap_or_default();
        let exact = query.get("resourceVersionMatch");
        if let Some(token) = query.get("continue").filter(|t| !t.is_empty()) {
            if !matches!(version, "" | "0") {
                return Err(Status::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            let (revision, after) = read_continue(token)?;
            range.at = revision;
            range.after = Some(after);
        } else if !matches!(version, "" | "0") {
            let revision: u64 = version.parse().map_err(|_| {
                Status::bad_request(format!(
                    "Invalid value: {version:?}: strconv.ParseUint: parsing {version:?}: invalid syntax"
                ))
            })?;
            let newest = self.registry.store.revision();
            if revision > newest {
                return Err(watch::read_failed(&ReadError::Future { requested: revision, newest }));
            }
            if exact == Some("Exact") || (exact.is_none() && range.limit > 0) {
                range.at = Some(revision);
            }
        }
        self.registry.list(call.kind, call.namespace(), &selection, range).map_err(|error| match error {
            ReadError::Compacted { .. } if query.get("continue").is_some() => {
                let mut status = Status::expired(CONTINUE_EXPIRED);
                let after =
                    query.get("continue").and_then(|token| read_continue(token).ok()).map(|(_, key)| key);
                status.continue_token = after.map(|key| write_continue(None, &key));
                status
            }
            other => watch::read_failed(&other),
        })
    }

    fn watch(&self, call: &Call) -> Result<Answer> {
        let request = watch::Request {
            namespace: call.namespace().to_owned(),
            selection: self.selection(call)?,
            query: call.query().clone(),
            form: Form { pretty: false, ..call.form.clone() },
        };
        watch::open(&self.registry, call.kind, request)
    }

    async fn create(&self, call: &Call<'_>, body: &Bytes) -> Result<Answer> {
        let object = self.decode_body(call, body)?;
        let namespace =
            if call.kind.namespaced && call.namespace().is_empty() { "default" } else { call.namespace() };
        let outcome = self.registry.create(call.kind, namespace, object, &call.context).await?;
        Ok(self.outcome(call, 201, &outcome))
    }

    async fn review(&self, call: &Call<'_>, body: &Bytes) -> Result<Answer> {
        if call.kind.kind == "Binding" {
            let binding = self.tree(&call.headers, body)?;
            let kind = self.registry.schema.resource("", "v1", "pods").expect("pods are built in");
            let place = Place { kind, namespace: call.namespace(), name: binding.name() };
            let value = subresources::bind(&self.registry, place, &binding, &call.context).await?;
            return self.show(call, 201, &value);
        }
        let accept = call.headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let plain = accept.is_empty() || accept.split(',').any(|clause| !clause.contains("as="));
        if call.form.shape != Shape::Whole && !plain {
            return Err(Status::not_acceptable(respond::MEDIA_TYPES));
        }
        let review = self.decode_body(call, body)?;
        let value = reviews::answer(
            &self.registry,
            &self.rbac,
            &self.tokens,
            call.kind,
            call.namespace(),
            review,
            &call.context.user,
        )?;
        self.show(call, 201, &value)
    }

    async fn update(&self, call: &Call<'_>, endpoint: Endpoint, body: &Bytes) -> Result<Answer> {
        let edit = Edit::Replace(self.decode_body(call, body)?);
        if endpoint == Endpoint::Main {
            let (outcome, created) =
                self.registry.modify_or_create(call.place(), edit, &call.context).await?;
            return Ok(self.outcome(call, if created { 201 } else { 200 }, &outcome));
        }
        let outcome = self.registry.modify(call.place(), endpoint, &edit, &call.context).await?;
        Ok(self.outcome(call, 200, &outcome))
    }

    async fn patch(&self, call: &Call<'_>, endpoint: Endpoint, body: &Bytes) -> Result<Answer> {
        let edit = self.edit_of(call, body)?;
        if endpoint == Endpoint::Main && matches!(edit, Edit::Apply { .. }) {
            let (outcome, created) =
                self.registry.modify_or_create(call.place(), edit, &call.context).await?;
            return Ok(self.outcome(call, if created { 201 } else { 200 }, &outcome));
        }
        let outcome = self.registry.modify(call.place(), endpoint, &edit, &call.context).await?;
        Ok(self.outcome(call, 200, &outcome))
    }

    /// The edit a PUT or PATCH body stands for, by content type.
    fn edit_of<'b>(&self, call: &Call<'_>, body: &'b Bytes) -> Result<Edit<'b>> {
        if call.info.verb == "update" {
            return Ok(Edit::Replace(self.decode_body(call, body)?));
        }
        match media_type(&call.headers) {
            "application/json-patch+json" => Ok(Edit::JsonPatch(body)),
            "application/merge-patch+json" => Ok(Edit::MergePatch(body)),
            "application/strategic-merge-patch+json" => Ok(Edit::StrategicPatch(body)),
            "application/apply-patch+yaml" => {
                if call.query().get("fieldManager").is_none_or(str::is_empty) {
                    let text = "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch";
                    return Err(Status::new(422, "Invalid", text));
                }
                let tree = decode::yaml_as(self.registry.schema, call.served.type_id, body)
                    .map_err(|e| Status::bad_request(format!("error decoding YAML: {e}")))?;
                let refuse = |object: &Value, why: &str| {
                    let text = format!(
                        "failed to create typed patch object ({}/{}; {}/{}, Kind={}): {why}",
                        object.namespace(),
                        object.name(),
                        call.served.group,
                        call.served.version,
                        call.served.kind,
                    );
                    // Upstream gives this error no reason.
                    Status::new(500, "", text)
                };
                if tree.at("metadata.managedFields").is_some() {
                    return Err(Status::bad_request("metadata.managedFields must be nil"));
                }
                let unknown = self.registry.unknown_fields(call.served, &tree);
                if let Some(field) = unknown.first() {
                    return Err(refuse(&tree, &format!(".{field}: field not declared in schema")));
                }
                let config = self.registry.decode(call.kind, tree, &call.context)?;
                let broken = knarr_api::apply::check_config(self.registry.schema, call.kind.type_id, &config);
                if !broken.is_empty() {
                    return Err(refuse(&config, &broken.join("\n")));
                }
                Ok(Edit::Apply { config, force: call.query().flag("force") })
            }
            _ => Err(Status::unsupported_media_type(
                "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml",
            )),
        }
    }

    async fn scale(&self, call: &Call<'_>, body: &Bytes) -> Result<Answer> {
        let replace = call.info.verb == "update";
        let media = media_type(&call.headers);
        let sent = if replace { Some(self.tree(&call.headers, body)?) } else { None };
        let type_id = self.registry.schema.type_named("autoscaling.v1.Scale");
        let edit = |scale: &Value| -> Result<Value> {
            match (&sent, media, type_id) {
                (Some(sent), ..) => Ok(sent.clone()),
                (None, "application/json-patch+json", _) => knarr_api::patch::json(scale, body),
                (None, "application/strategic-merge-patch+json", Some(id)) => {
                    knarr_api::patch::strategic(self.registry.schema, id, scale, body)
                }
                (None, "application/apply-patch+yaml", _) => {
                    let config = decode::yaml(body)
                        .map_err(|e| Status::bad_request(format!("error decoding YAML: {e}")))?;
                    let mut new = scale.clone();
                    if let Some(replicas) = config.at("spec.replicas") {
                        new.set_at("spec.replicas", replicas.clone());
                    }
                    Ok(new)
                }
                _ => knarr_api::patch::merge(scale, body),
            }
        };
        let value = subresources::update_scale(&self.registry, call.place(), &edit, &call.context).await?;
        self.show(call, 200, &value)
    }

    async fn delete(&self, call: &Call<'_>, body: &Bytes) -> Result<Answer> {
        let options = self.delete_options(call, body)?;
        let (outcome, gone) = self.registry.delete(call.place(), &options, &call.context).await?;
        let rules = knarr_api::rules::Rules::of(call.kind);
        if gone && !rules.returns_deleted {
            let object = outcome.value();
            let mut details =
                json!({ "name": call.target.name, "kind": call.kind.plural, "uid": object.uid() });
            if !call.served.group.is_empty() {
                details["group"] = json!(call.served.group);
            }
            let value = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details });
            return self.show(call, 200, &value);
        }
        Ok(self.outcome(call, 200, &outcome))
    }

    async fn delete_collection(&self, call: &Call<'_>, body: &Bytes) -> Result<Answer> {
        let options = self.delete_options(call, body)?;
        let page = self.page(call)?;
        let mut deleted = Vec::new();
        for entry in &page.entries {
            let (namespace, name) = crate::encode::split_key(&entry.key);
            let place = Place { kind: call.kind, namespace, name };
            match self.registry.delete(place, &options, &call.context).await {
                Ok((outcome, _)) => deleted.push(outcome.bytes(call.kind)),
                // Somebody else was faster: gone is what was asked for.
                Err(status) if status.reason == "NotFound" => {}
                Err(status) => return Err(status),
            }
        }
        let metadata = page_metadata(&page);
        Ok(respond::list(call.kind, metadata, &deleted, &call.form, self.clock()))
    }

    fn delete_options(&self, call: &Call, body: &Bytes) -> Result<DeleteOptions> {
        let options = if body.is_empty() { Value::Null } else { self.tree(&call.headers, body)? };
        DeleteOptions::read(&options, call.query())
    }

    fn decode_body(&self, call: &Call, body: &Bytes) -> Result<Value> {
        match media_type(&call.headers) {
            "application/yaml" => {
                let tree = decode::yaml_as(self.registry.schema, call.served.type_id, body)
                    .map_err(|e| Status::bad_request(e.0))?;
                self.registry.decode(call.kind, tree, &call.context)
            }
            wire::MEDIA_TYPE => {
                let tree = protobuf::decode(self.registry.schema, call.served.type_id, body)
                    .map_err(|e| Status::bad_request(e.0))?;
                self.registry.decode(call.kind, tree, &call.context)
            }
            "application/json" | "" => self.registry.decode_json(call.kind, body, &call.context),
            _ => Err(Status::unsupported_media_type(respond::MEDIA_TYPES)),
        }
    }

    /// A body of another type than the resource's, as a tree: options, scales, bindings.
    fn tree(&self, headers: &HeaderMap, body: &Bytes) -> Result<Value> {
        match media_type(headers) {
            "application/yaml" => decode::yaml(body).map_err(|e| Status::bad_request(e.0)),
            wire::MEDIA_TYPE => {
                let (version, kind, _) = protobuf::envelope(body).map_err(|e| Status::bad_request(e.0))?;
                let id = wire::type_of(&version, &kind).ok_or_else(|| {
                    Status::bad_request(format!("no kind {kind:?} is registered for version {version:?}"))
                })?;
                protobuf::decode(self.registry.schema, id, body).map_err(|e| Status::bad_request(e.0))
            }
            "application/json" | "" => serde_json::from_slice(body).map_err(|e| {
                Status::bad_request(format!("couldn't get version/kind; json parse error: {e}"))
            }),
            _ => Err(Status::unsupported_media_type(respond::MEDIA_TYPES)),
        }
    }
}

/// The keys that verify service account tokens; others may keep them an hour, as upstream says.
fn key_set(tokens: &Tokens) -> Answer {
    let body = respond::full(tokens.key_set().to_string());
    let mut answer = respond::answer(200, "application/jwk-set+json", body);
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=3600"));
    answer
}

/// Namespace and name of the service account a user name stands for.
fn account_of(user: &str) -> Option<(&str, &str)> {
    user.strip_prefix("system:serviceaccount:")?.split_once(':')
}

/// Extra keys may hold bytes that header names may not.
fn percent_decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

async fn read_body(body: Body) -> Result<Bytes> {
    match Limited::new(body, BODY_BYTES_MAX).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            Err(Status::too_large(BODY_BYTES_MAX))
        }
        Err(error) => Err(Status::bad_request(format!("cannot read the body: {error}"))),
    }
}

fn media_type(headers: &HeaderMap) -> &str {
    let value = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim()
}

/// `fieldManager`, or the user agent up to its first slash.
fn field_manager(headers: &HeaderMap, query: &Query) -> String {
    if let Some(name) = query.get("fieldManager").filter(|n| !n.is_empty()) {
        return name.to_owned();
    }
    let agent = headers.get(header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or("unknown");
    agent.split('/').next().unwrap_or(agent).chars().take(128).collect()
}

fn aggregated_version(accept: &str) -> Option<&'static str> {
    accept.split(',').find_map(|clause| {
        let wanted = clause.contains("as=APIGroupDiscoveryList") && clause.contains("g=apidiscovery.k8s.io");
        match wanted {
            true if clause.contains("v=v2beta1") => Some("v2beta1"),
            true => Some("v2"),
            false => None,
        }
    })
}

/// An error about the resource, naming it as the request did. Errors about the object's content name the
/// kind of the stored version, as upstream's do.
fn in_words_of(status: &mut Status, kind: &Kind, served: &Kind) {
    let (ours, theirs) = (kind.resource(), served.resource());
    if ours == theirs {
        return;
    }
    for start in ["", "Operation cannot be fulfilled on "] {
        let Some(rest) = status.message.strip_prefix(&format!("{start}{ours} ")) else { continue };
        status.message = format!("{start}{theirs} {rest}");
        if let Some(details) = &mut status.details {
            match served.group.as_str() {
                "" => drop(details.remove_at("group")),
                group => details["group"] = json!(group),
            }
        }
        return;
    }
}

fn aggregated_answer(catalog: Catalog, core: bool, version: &'static str, headers: &HeaderMap) -> Answer {
    let document = discovery::aggregated(catalog, core, version).to_string();
    let content_type = match version {
        "v2beta1" => "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList",
        _ => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
    };
    let etag = openapi::digest(document.as_bytes());
    openapi::serve::with_etag(headers, &etag, content_type, || document.into())
}

fn version() -> Value {
    let mut numbers = crate::VERSION.trim_start_matches('v').split('.');
    json!({
        "major": numbers.next(),
        "minor": numbers.next(),
        "emulationMajor": "1",
        "emulationMinor": "36",
        "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "35",
        "gitVersion": format!("{}+knarr", crate::VERSION),
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "rustc",
        "platform": "linux/amd64",
    })
}

/// Upstream's words; the token in the answer goes on from the same key in the present state.
const CONTINUE_EXPIRED: &str = "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and now may show up in the list.";

/// Which options of a list go together.
fn check_list_options(query: &Query) -> Result<()> {
    const MATCH: &str = "resourceVersionMatch";
    let text = |name: &str| query.get(name).unwrap_or_default();
    let (wanted, version) = (text(MATCH), text("resourceVersion"));
    let mut errors = Vec::new();
    if !wanted.is_empty() {
        if version.is_empty() {
            let detail = "resourceVersionMatch is forbidden unless resourceVersion is provided";
            errors.push(field::Error::forbidden(MATCH, detail));
        }
        if !text("continue").is_empty() {
            let detail = "resourceVersionMatch is forbidden when continue is provided";
            errors.push(field::Error::forbidden(MATCH, detail));
        }
        if !matches!(wanted, "Exact" | "NotOlderThan") {
            errors.push(field::Error::not_supported(MATCH, wanted, &["Exact", "NotOlderThan", ""]));
        }
        if wanted == "Exact" && version == "0" {
            let detail = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
            errors.push(field::Error::forbidden(MATCH, detail));
        }
    }
    if query.get("sendInitialEvents").is_some() {
        let detail = "sendInitialEvents is forbidden for list";
        errors.push(field::Error::forbidden("sendInitialEvents", detail));
    }
    if errors.is_empty() { Ok(()) } else { Err(Status::invalid_options("ListOptions", &errors)) }
}

/// The revision of a page and where the next one begins.
fn page_metadata(page: &Page) -> Value {
    let mut metadata = json!({ "resourceVersion": page.revision.to_string() });
    if page.remaining > 0
        && let Some(last) = page.entries.last()
    {
        metadata["continue"] = json!(write_continue(Some(page.revision), &last.key));
        if page.counted {
            metadata["remainingItemCount"] = json!(page.remaining);
        }
    }
    metadata
}

/// Where a list goes on; without a revision, in whatever is there then.
fn write_continue(revision: Option<u64>, key: &str) -> String {
    let revision = revision.map_or(json!(-1), |r| json!(r));
    URL_SAFE_NO_PAD.encode(json!({ "v": "meta.k8s.io/v1", "rv": revision, "start": key }).to_string())
}

fn read_continue(token: &str) -> Result<(Option<u64>, String)> {
    let bad = || Status::bad_request("continue key is not valid: encoded token is malformed");
    let bytes = URL_SAFE_NO_PAD.decode(token.trim_end_matches('=')).map_err(|_| bad())?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|_| bad())?;
    if value.str_at("v") != "meta.k8s.io/v1" {
        return Err(bad());
    }
    let revision = value.int_at("rv").and_then(|r| u64::try_from(r).ok());
    Ok((revision, value.str_at("start").to_owned()))
}
