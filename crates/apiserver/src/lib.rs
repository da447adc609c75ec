//! The API server: authentication, authorization, admission, registry, watch cache, discovery, proxies.
