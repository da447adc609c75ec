//! What each image is made of. One row each; to add an image, add a row.

use serde_json::{Value, json};

/// One image.
#[derive(Debug)]
pub struct Recipe {
    /// The archive's name.
    pub name: &'static str,
    /// The repository, as manifests write it.
    pub repository: &'static str,
    /// Tags besides the version's.
    pub tags: &'static [&'static str],
    /// Whether the upstream version, `1.22`, is a tag too.
    pub version_tag: bool,
    pub base: Base,
    /// Whether busybox is added, so that `exec -- sh` works.
    pub shell: bool,
    pub files: &'static [(&'static str, &'static str)],
    /// Path, mode, owner.
    pub directories: &'static [(&'static str, u32, u64)],
    pub links: &'static [(&'static str, &'static str)],
    pub entrypoint: &'static [&'static str],
    pub cmd: &'static [&'static str],
    pub working_dir: &'static str,
    pub ports: &'static [&'static str],
    pub stop_signal: &'static str,
}

/// Where the programs come from.
#[derive(Clone, Copy, Debug)]
pub enum Base {
    /// Debian packages and the libraries they need; the first one's version is the image's.
    Packages(&'static [&'static str]),
    /// Our own test program.
    Toolbox,
}

/// Where names without a host belong, by everybody's convention.
const DEFAULT_PREFIX: &str = "docker.io/library";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const NGINX_USER: u64 = 101;
const REDIS_USER: u64 = 999;

/// Files of every image.
pub const BASICS: [(&str, &str); 3] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnginx:x:101:101:nginx:/nonexistent:/bin/false\n\
         redis:x:999:999:redis:/data:/bin/false\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    ),
    ("etc/group", "root:x:0:\ntty:x:5:\nnginx:x:101:\nredis:x:999:\nnogroup:x:65534:\n"),
    ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
];

const NGINX_CONF: &str = "\
user nginx;
worker_processes 1;
error_log /var/log/nginx/error.log notice;
pid /run/nginx.pid;
events { worker_connections 1024; }
http {
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    log_format main '$remote_addr - $remote_user [$time_local] \"$request\" $status $body_bytes_sent \"$http_referer\" \"$http_user_agent\"';
    access_log /var/log/nginx/access.log main;
    sendfile on;
    keepalive_timeout 65;
    include /etc/nginx/conf.d/*.conf;
}
";

const NGINX_DEFAULT: &str = "\
server {
    listen 80;
    listen [::]:80;
    server_name localhost;
    location / {
        root /usr/share/nginx/html;
        index index.html index.htm;
    }
}
";

const NGINX_PAGE: &str = "<!DOCTYPE html>\n<html>\n<head><title>Welcome to nginx!</title></head>\n<body>\n\
    <h1>Welcome to nginx!</h1>\n<p>This server runs in a container.</p>\n</body>\n</html>\n";

const NGINX_NEXT_PAGE: &str = "<!DOCTYPE html>\n<html>\n<head><title>Welcome to nginx!</title></head>\n<body>\n\
    <h1>Welcome to nginx!</h1>\n<p>This is the next version.</p>\n</body>\n</html>\n";

const NGINX: Recipe = Recipe {
    name: "nginx",
    repository: "nginx",
    tags: &["latest"],
    version_tag: true,
    base: Base::Packages(&["nginx", "nginx-common"]),
    shell: true,
    files: &[
        ("etc/nginx/nginx.conf", NGINX_CONF),
        ("etc/nginx/conf.d/default.conf", NGINX_DEFAULT),
        ("usr/share/nginx/html/index.html", NGINX_PAGE),
    ],
    directories: &[
        ("var/lib/nginx", 0o755, NGINX_USER),
        ("var/log/nginx", 0o755, NGINX_USER),
        ("var/cache/nginx", 0o755, NGINX_USER),
    ],
    links: &[("var/log/nginx/access.log", "/dev/stdout"), ("var/log/nginx/error.log", "/dev/stderr")],
    entrypoint: &[],
    cmd: &["nginx", "-g", "daemon off;"],
    working_dir: "/",
    ports: &["80/tcp"],
    stop_signal: "SIGQUIT",
};

/// All images.
pub const RECIPES: [Recipe; 5] = [
    Recipe {
        name: "busybox",
        repository: "busybox",
        tags: &["latest"],
        version_tag: true,
        base: Base::Packages(&["busybox-static"]),
        shell: true,
        files: &[],
        directories: &[],
        links: &[],
        entrypoint: &[],
        cmd: &["sh"],
        working_dir: "/",
        ports: &[],
        stop_signal: "",
    },
    NGINX,
    // The same server with another page: something to update to.
    Recipe {
        name: "nginx-next",
        tags: &["next"],
        version_tag: false,
        files: &[
            ("etc/nginx/nginx.conf", NGINX_CONF),
            ("etc/nginx/conf.d/default.conf", NGINX_DEFAULT),
            ("usr/share/nginx/html/index.html", NGINX_NEXT_PAGE),
        ],
        ..NGINX
    },
    Recipe {
        name: "redis",
        repository: "redis",
        tags: &["latest"],
        version_tag: true,
        base: Base::Packages(&["redis-server", "redis-tools"]),
        shell: true,
        files: &[],
        directories: &[("data", 0o755, REDIS_USER)],
        links: &[],
        entrypoint: &[],
        cmd: &["redis-server", "--protected-mode", "no"],
        working_dir: "/data",
        ports: &["6379/tcp"],
        stop_signal: "",
    },
    Recipe {
        name: "toolbox",
        repository: "toolbox",
        tags: &["latest"],
        version_tag: true,
        base: Base::Toolbox,
        shell: false,
        files: &[],
        directories: &[],
        links: &[],
        entrypoint: &["/toolbox"],
        cmd: &["serve"],
        working_dir: "/",
        ports: &["8080/tcp"],
        stop_signal: "",
    },
];

impl Recipe {
    /// The image's names, with the version's tag (`1.22`) first.
    pub fn full_names(&self, version: &str) -> Vec<String> {
        let short = version.split('.').take(2).collect::<Vec<_>>().join(".");
        let version = self.version_tag.then_some(short);
        let tags = version.into_iter().chain(self.tags.iter().map(|tag| (*tag).to_owned()));
        tags.map(|tag| format!("{DEFAULT_PREFIX}/{}:{tag}", self.repository)).collect()
    }

    /// The process part of the image's configuration.
    pub fn config(&self) -> Value {
        let mut config = json!({ "Env": [PATH], "WorkingDir": self.working_dir, "Cmd": self.cmd });
        if !self.entrypoint.is_empty() {
            config["Entrypoint"] = json!(self.entrypoint);
        }
        for port in self.ports {
            config["ExposedPorts"][port] = json!({});
        }
        if !self.stop_signal.is_empty() {
            config["StopSignal"] = json!(self.stop_signal);
        }
        config
    }
}
