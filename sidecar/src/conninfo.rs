//! Connection strings as libpq reads them: URL or `key=value`, then `PG*` environment variables, then `~/.pgpass`.
//!
//! Parameters that would weaken security if they were ignored (a revocation list, `requirepeer`) are refused.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use percent_encoding::percent_decode_str;

use crate::error::{Error, Result};

/// How a connection is encrypted and what is checked; as libpq's `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// Never.
    Disable,
    /// If the server can. (`allow` is taken as this.)
    Prefer,
    /// Always; the certificate is checked only if a root certificate file is there.
    Require,
    /// Always, with a certificate of a known authority.
    VerifyCa,
    /// And that is for this host.
    VerifyFull,
}

/// Connection parameters by libpq's names.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ConnInfo {
    parameters: BTreeMap<String, String>,
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown =
            self.parameters.iter().map(|(k, v)| (k, if is_secret(k) { "********" } else { v.as_str() }));
        f.debug_map().entries(shown).finish()
    }
}

impl fmt::Display for ConnInfo {
    /// Where it leads, without anything secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |key| self.get(key).unwrap_or_default();
        write!(f, "{}@{}:{}/{}", part("user"), part("host"), part("port"), part("dbname"))
    }
}

/// Parameters that have a meaning here, and the environment variable of each.
const PARAMETERS: &[(&str, &str)] = &[
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("port", "PGPORT"),
    ("dbname", "PGDATABASE"),
    ("user", "PGUSER"),
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("options", "PGOPTIONS"),
    ("sslmode", "PGSSLMODE"),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
    ("sslnegotiation", "PGSSLNEGOTIATION"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
    ("keepalives", ""),
    ("keepalives_idle", ""),
    ("keepalives_interval", ""),
    ("keepalives_count", ""),
    ("tcp_user_timeout", ""),
];

/// Parameters that may stand in a connection string without changing what is done here.
const WITHOUT_EFFECT: &[&str] = &[
    "application_name",
    "fallback_application_name",
    "client_encoding",
    "gssencmode",
    "gsslib",
    "krbsrvname",
    "sslcompression",
    "sslsni",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "load_balance_hosts",
];

impl ConnInfo {
    /// Reads a connection string and completes it from the process's environment and password file.
    pub fn resolve(text: &str) -> Result<ConnInfo> {
        let user = whoami::username().unwrap_or_else(|_| "postgres".into());
        let mut info = ConnInfo::parse(text)?;
        info.complete(&|name| std::env::var(name).ok(), &user)?;
        info.read_password_file(std::env::var_os("HOME").map(PathBuf::from).as_deref());
        Ok(info)
    }

    /// Reads a connection string and nothing else.
    pub fn parse(text: &str) -> Result<ConnInfo> {
        let mut info = ConnInfo::default();
        match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
            Some(rest) => info.read_url(rest)?,
            None if text.contains('=') => info.read_pairs(text)?,
            None if text.contains("://") => return Err(bad("the scheme must be postgresql")),
            None if text.is_empty() => {}
            None => info.set("dbname", text.to_owned())?,
        }
        Ok(info)
    }

    /// A parameter's value.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.parameters.get(key).map(String::as_str)
    }

    /// The hosts, in order of preference; a path is a socket's directory.
    pub fn hosts(&self) -> Vec<&str> {
        self.get("host").unwrap_or_default().split(',').collect()
    }

    /// A parameter read as a number.
    pub fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>> {
        match self.get(key) {
            None | Some("") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| bad(&format!("{key} must be a number"))),
        }
    }

    /// The encryption asked for.
    pub fn ssl_mode(&self) -> Result<SslMode> {
        Ok(match self.get("sslmode").unwrap_or("prefer") {
            "disable" => SslMode::Disable,
            "allow" | "prefer" => SslMode::Prefer,
            "require" => SslMode::Require,
            "verify-ca" => SslMode::VerifyCa,
            "verify-full" => SslMode::VerifyFull,
            other => {
                return Err(bad(&format!("unknown sslmode \"{other}\""))
                    .hint("one of disable, prefer, require, verify-ca, verify-full"));
            }
        })
    }

    fn set(&mut self, key: &str, value: String) -> Result<()> {
        match key {
            "gssencmode" if value == "require" => return Err(bad("GSS encryption is not supported")),
            "ssl" if value == "true" => return self.set("sslmode", "require".into()),
            _ => {}
        }
        if PARAMETERS.iter().any(|(known, _)| *known == key) {
            self.parameters.insert(key.to_owned(), value);
        } else if !WITHOUT_EFFECT.contains(&key) {
            return Err(bad(&format!("connection parameter \"{key}\" is not supported")));
        }
        Ok(())
    }

    fn read_url(&mut self, rest: &str) -> Result<()> {
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, dbname) = rest.split_once('/').unwrap_or((rest, ""));
        let (userinfo, hosts) = match authority.rsplit_once('@') {
            Some((userinfo, hosts)) => (Some(userinfo), hosts),
            None => (None, authority),
        };
        if let Some(userinfo) = userinfo {
            let (user, password) = match userinfo.split_once(':') {
                Some((user, password)) => (user, Some(password)),
                None => (userinfo, None),
            };
            if !user.is_empty() {
                self.set("user", decode(user)?)?;
            }
            if let Some(password) = password {
                self.set("password", decode(password)?)?;
            }
        }
        if !hosts.is_empty() {
            let (mut names, mut ports) = (Vec::new(), Vec::new());
            for host in hosts.split(',') {
                let (name, port) = split_host(host)?;
                names.push(decode(name)?);
                ports.push(port.to_owned());
            }
            if names.iter().any(|name| !name.is_empty()) {
                self.set("host", names.join(","))?;
            }
            if ports.iter().any(|port| !port.is_empty()) {
                self.set("port", ports.join(","))?;
            }
        }
        if !dbname.is_empty() {
            self.set("dbname", decode(dbname)?)?;
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| bad("a parameter in the URL has no value"))?;
            self.set(&decode(key)?, decode(value)?)?;
        }
        Ok(())
    }

    fn read_pairs(&mut self, text: &str) -> Result<()> {
        let mut chars = text.chars().peekable();
        loop {
            while chars.next_if(|c| c.is_whitespace()).is_some() {}
            if chars.peek().is_none() {
                return Ok(());
            }
            let mut key = String::new();
            while let Some(c) = chars.next_if(|c| *c != '=' && !c.is_whitespace()) {
                key.push(c);
            }
            while chars.next_if(|c| c.is_whitespace()).is_some() {}
            if chars.next() != Some('=') {
                return Err(bad(&format!("missing \"=\" after \"{key}\"")));
            }
            while chars.next_if(|c| c.is_whitespace()).is_some() {}
            let quoted = chars.next_if_eq(&'\'').is_some();
            let mut value = String::new();
            loop {
                match chars.next() {
                    Some('\'') if quoted => break,
                    Some('\\') => value.extend(chars.next()),
                    Some(c) if !quoted && c.is_whitespace() => break,
                    Some(c) => value.push(c),
                    None if quoted => return Err(bad(&format!("the quoted value of \"{key}\" has no end"))),
                    None => break,
                }
            }
            self.set(&key, value)?;
        }
    }

    /// Fills in what the string left out, from the environment, then from the defaults.
    fn complete(&mut self, env: &dyn Fn(&str) -> Option<String>, os_user: &str) -> Result<()> {
        for (key, variable) in PARAMETERS.iter().filter(|(_, variable)| !variable.is_empty()) {
            if self.get(key).is_none_or(str::is_empty)
                && let Some(value) = env(variable)
            {
                self.set(key, value)?;
            }
        }
        self.fill("port", "5432");
        self.fill("user", os_user);
        let user = self.get("user").unwrap_or(os_user).to_owned();
        self.fill("dbname", &user);
        if self.get("hostaddr").is_none() {
            let sockets = ["/var/run/postgresql", "/tmp"].into_iter().find(|dir| Path::new(dir).is_dir());
            self.fill("host", sockets.unwrap_or("localhost"));
        }
        Ok(())
    }

    fn fill(&mut self, key: &str, value: &str) {
        let entry = self.parameters.entry(key.to_owned()).or_default();
        if entry.is_empty() {
            value.clone_into(entry);
        }
    }

    fn read_password_file(&mut self, home: Option<&Path>) {
        if self.get("password").is_some_and(|p| !p.is_empty()) {
            return;
        }
        let path = match (self.get("passfile"), home) {
            (Some(path), _) if !path.is_empty() => PathBuf::from(path),
            (_, Some(home)) => home.join(".pgpass"),
            _ => return,
        };
        let Ok(text) = std::fs::read_to_string(&path) else { return };
        if !private(&path) {
            tracing::warn!("password file {} is ignored: others can read it (chmod 600)", path.display());
            return;
        }
        if let Some(password) = self.find_password(&text) {
            self.parameters.insert("password".into(), password);
        }
    }

    /// The password of the first line that fits the first host.
    fn find_password(&self, file: &str) -> Option<String> {
        let host = match self.hosts().first().copied().unwrap_or_default() {
            "" => self.get("hostaddr").unwrap_or("localhost"),
            socket if socket.starts_with('/') => "localhost",
            host => host,
        };
        let port = self.get("port").unwrap_or("5432").split(',').next().unwrap_or_default();
        let wanted = [host, port, self.get("dbname")?, self.get("user")?];
        file.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
            let fields = password_fields(line);
            let fits = fields.len() == 5
                && wanted.iter().zip(&fields).all(|(want, field)| field.raw == "*" || field.value == *want);
            fits.then(|| fields[4].value.clone())
        })
    }
}

struct Field {
    raw: String,
    value: String,
}

/// Splits a line of a password file; `\` escapes the next character. The fifth field goes on to the end.
fn password_fields(line: &str) -> Vec<Field> {
    let mut fields = vec![Field { raw: String::new(), value: String::new() }];
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == ':' && fields.len() < 5 {
            fields.push(Field { raw: String::new(), value: String::new() });
            continue;
        }
        let escaped = if c == '\\' { chars.next() } else { None };
        if let Some(field) = fields.last_mut() {
            field.raw.push(c);
            field.raw.extend(escaped);
            field.value.push(escaped.unwrap_or(c));
        }
    }
    fields
}

#[cfg(unix)]
fn private(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o077 == 0)
}

#[cfg(not(unix))]
fn private(_path: &Path) -> bool {
    true
}

fn split_host(host: &str) -> Result<(&str, &str)> {
    if let Some(rest) = host.strip_prefix('[') {
        let (name, rest) = rest.split_once(']').ok_or_else(|| bad("missing \"]\" in an IPv6 address"))?;
        return Ok((name, rest.strip_prefix(':').unwrap_or("")));
    }
    Ok(host.split_once(':').unwrap_or((host, "")))
}

fn decode(text: &str) -> Result<String> {
    let decoded =
        percent_decode_str(text).decode_utf8().map_err(|_| bad("not UTF-8 after percent decoding"))?;
    if decoded.contains('\0') { Err(bad("a zero byte")) } else { Ok(decoded.into_owned()) }
}

fn is_secret(key: &str) -> bool {
    key == "password"
}

/// Never quotes the string: it may hold a password.
fn bad(what: &str) -> Error {
    Error::usage(format!("can't read the connection string: {what}"))
        .hint("postgresql://user@host:port/database?sslmode=verify-full, or host=... dbname=...")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(text: &str, env: &[(&str, &str)]) -> ConnInfo {
        let mut info = ConnInfo::parse(text).unwrap();
        let find = |name: &str| env.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned());
        info.complete(&find, "osuser").unwrap();
        info
    }

    #[test]
    fn urls_are_read() {
        let info = ConnInfo::parse(
            "postgresql://me:p%40ss%3A@db1.example:5433,[::1]:5434/shop?sslmode=verify-full&connect_timeout=3",
        )
        .unwrap();
        assert_eq!(info.get("user"), Some("me"));
        assert_eq!(info.get("password"), Some("p@ss:"));
        assert_eq!(info.hosts(), ["db1.example", "::1"]);
        assert_eq!(info.get("port"), Some("5433,5434"));
        assert_eq!(info.get("dbname"), Some("shop"));
        assert_eq!(info.ssl_mode().unwrap(), SslMode::VerifyFull);
        assert_eq!(info.number::<u64>("connect_timeout").unwrap(), Some(3));
        assert_eq!(ConnInfo::parse("postgres://%2Fvar%2Frun/db").unwrap().hosts(), ["/var/run"]);
        assert_eq!(
            ConnInfo::parse("postgres:///db?host=/tmp/x&port=6000").unwrap().get("port"),
            Some("6000")
        );
    }

    #[test]
    fn pairs_are_read() {
        let info = ConnInfo::parse(r"host=h dbname='my \'db\\' user = u password=a\ b").unwrap();
        assert_eq!(info.get("dbname"), Some(r"my 'db\"));
        assert_eq!(info.get("user"), Some("u"));
        assert_eq!(info.get("password"), Some("a b"));
        assert_eq!(ConnInfo::parse("shop").unwrap().get("dbname"), Some("shop"));
    }

    #[test]
    fn the_environment_fills_gaps_only() {
        let info =
            completed("postgres://h/", &[("PGHOST", "other"), ("PGPORT", "6543"), ("PGSSLMODE", "require")]);
        assert_eq!((info.get("host"), info.get("port")), (Some("h"), Some("6543")));
        assert_eq!(info.ssl_mode().unwrap(), SslMode::Require);
        assert_eq!((info.get("user"), info.get("dbname")), (Some("osuser"), Some("osuser")));
        let info = completed("host=h user=x", &[]);
        assert_eq!((info.get("dbname"), info.get("port")), (Some("x"), Some("5432")));
    }

    #[test]
    fn nothing_secret_is_shown() {
        let info = completed("postgres://u:hush@h/d", &[]);
        assert!(!format!("{info:?} {info}").contains("hush"));
        for text in ["postgres://u:hush@h/d?bogus=1", "host=h password=hush bogus=1", "password='hush"] {
            let error = ConnInfo::parse(text).unwrap_err();
            assert!(!error.report().contains("hush"), "{}", error.report());
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        for text in [
            "postgres://h/d?sslcrl=x",
            "host=h requirepeer=x",
            "service=x",
            "gssencmode=require",
            "mysql://h",
        ] {
            assert!(ConnInfo::parse(text).is_err(), "{text}");
        }
        assert!(ConnInfo::parse("sslmode=sometimes").unwrap().ssl_mode().is_err());
    }

    #[test]
    fn the_password_file_is_searched() {
        let info = completed("host=h port=1 dbname=d user=u", &[]);
        let file = "# comment\nh:1:d:other:no\nh:1:d:u:a\\:b\\\\c:d\n*:*:*:*:any\n";
        assert_eq!(info.find_password(file).as_deref(), Some("a:b\\c:d"));
        assert_eq!(
            completed("host=/tmp user=x", &[]).find_password("localhost:5432:x:x:local").as_deref(),
            Some("local")
        );
        assert_eq!(info.find_password("h:2:*:*:no"), None);
    }
}
