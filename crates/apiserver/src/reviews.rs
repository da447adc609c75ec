//! Reviews: questions about users and permissions, answered and forgotten.

use knarr_api::object::Object;
use knarr_api::schema::Kind;
use knarr_api::status::{Result, Status};
use serde_json::{Value, json};

use crate::authn::Tokens;
use crate::identity::User;
use crate::rbac::{Action, PolicyRule, Rbac};
use crate::registry::Registry;

/// Answers a review.
pub fn answer(
    registry: &Registry,
    rbac: &Rbac,
    tokens: &Tokens,
    kind: &Kind,
    namespace: &str,
    mut review: Value,
    user: &User,
) -> Result<Value> {
    let status = match kind.kind.as_str() {
        "SelfSubjectReview" => json!({ "userInfo": user_info(user) }),
        "TokenReview" => token_review(registry, tokens, &review),
        "SelfSubjectAccessReview" => access(rbac, &review, user),
        "SubjectAccessReview" | "LocalSubjectAccessReview" => {
            let local = review.str_at("spec.resourceAttributes.namespace");
            if kind.namespaced && local != namespace {
                return Err(Status::bad_request("spec.resourceAttributes.namespace must match namespace"));
            }
            access(rbac, &review, &named_user(&review))
        }
        "SelfSubjectRulesReview" if review.str_at("spec.namespace").is_empty() => {
            return Err(Status::bad_request("no namespace on request"));
        }
        "SelfSubjectRulesReview" => rules(rbac, review.str_at("spec.namespace"), user),
        other => return Err(Status::internal(format!("{other} is no review"))),
    };
    review["status"] = status;
    if !review.get("metadata").is_some_and(Value::is_object) {
        review["metadata"] = json!({});
    }
    Ok(review)
}

fn user_info(user: &User) -> Value {
    let mut info = json!({ "username": user.name, "groups": user.groups });
    if !user.uid.is_empty() {
        info["uid"] = json!(user.uid);
    }
    if !user.extra.is_empty() {
        info["extra"] = user.extra.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
    }
    info
}

fn token_review(registry: &Registry, tokens: &Tokens, review: &Value) -> Value {
    let audiences: Vec<String> =
        review.list_at("spec.audiences").iter().filter_map(|a| a.as_str().map(str::to_owned)).collect();
    match tokens.verify(review.str_at("spec.token"), &audiences, registry) {
        Ok(user) => {
            let audiences = if audiences.is_empty() { vec![tokens.issuer().to_owned()] } else { audiences };
            json!({ "authenticated": true, "user": user_info(&user), "audiences": audiences })
        }
        Err(error) => json!({ "authenticated": false, "user": {}, "error": error.to_string() }),
    }
}

fn named_user(review: &Value) -> User {
    let groups = review.list_at("spec.groups").iter().filter_map(|g| g.as_str().map(str::to_owned)).collect();
    User { name: review.str_at("spec.user").to_owned(), groups, ..User::default() }
}

fn access(rbac: &Rbac, review: &Value, user: &User) -> Value {
    let spec = &review["spec"];
    let attributes = spec.at("resourceAttributes").unwrap_or(&Value::Null);
    let path = spec.at("nonResourceAttributes").map(|n| n.str_at("path"));
    let action = Action {
        verb: if path.is_some() {
            spec.str_at("nonResourceAttributes.verb")
        } else {
            attributes.str_at("verb")
        },
        group: attributes.str_at("group"),
        resource: attributes.str_at("resource"),
        subresource: attributes.str_at("subresource"),
        namespace: attributes.str_at("namespace"),
        name: attributes.str_at("name"),
        path,
    };
    if rbac.allows(user, &action) {
        json!({ "allowed": true, "reason": "RBAC: allowed by a role bound to the user or one of its groups" })
    } else {
        json!({ "allowed": false })
    }
}

fn rules(rbac: &Rbac, namespace: &str, user: &User) -> Value {
    let all = rbac.rules_for(user, namespace);
    let resource = |r: &PolicyRule| {
        let mut rule = json!({ "verbs": r.verbs, "apiGroups": r.groups, "resources": r.resources });
        if !r.names.is_empty() {
            rule["resourceNames"] = json!(r.names);
        }
        rule
    };
    let mut status = json!({
        "resourceRules": all.iter().filter(|r| r.urls.is_empty()).map(resource).collect::<Vec<_>>(),
        "nonResourceRules": all.iter().filter(|r| !r.urls.is_empty())
            .map(|r| json!({ "verbs": r.verbs, "nonResourceURLs": r.urls })).collect::<Vec<_>>(),
        "incomplete": false,
    });
    if crate::node::node_of(user).is_some() {
        // What a node may do depends on its pods, which no rule says.
        status["incomplete"] = json!(true);
        status["evaluationError"] = json!("node authorizer does not support user rule resolution");
    }
    status
}
