//! Encrypted connections: `sslmode` means what it means in libpq.

use std::path::PathBuf;

use integration::cluster::{Cluster, Stop};
use integration::db::Db;
use integration::pair::{DATABASE, Pair};
use integration::sidecar::{Invocation, exit};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// An authority of its own, and its certificate in a file.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    file: PathBuf,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names are valid names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, key()).expect("a certificate that signs itself");
        let file = std::env::temp_dir().join(format!("pgdm-it-{}-{name}.crt", std::process::id()));
        std::fs::write(&file, issuer.pem()).expect("a temporary file");
        Self { issuer, file }
    }

    /// Gives a server a certificate for `localhost`.
    fn certify(&self, cluster: &Cluster) {
        let key = key();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("localhost is a name");
        let certificate = params.signed_by(&key, &self.issuer).expect("a signed certificate");
        let certificate = cluster.write_secret("server.crt", &certificate.pem());
        let key = cluster.write_secret("server.key", &key.serialize_pem());
        for line in [
            "ssl = on".to_owned(),
            "log_connections = on".to_owned(),
            format!("ssl_cert_file = '{}'", certificate.display()),
            format!("ssl_key_file = '{}'", key.display()),
        ] {
            cluster.configure(&line);
        }
        cluster.restart(Stop::Fast);
    }
}

fn key() -> KeyPair {
    KeyPair::generate().expect("a new key")
}

/// Runs the pair's one table over TCP, the target under these parameters.
fn run(pair: &Pair, host: &str, parameters: &str) -> Invocation {
    let target = pair.target_cluster.tcp_url(DATABASE).replace("127.0.0.1", host);
    Invocation::new("run").args(&[
        "--source",
        &pair.source_cluster.url(DATABASE),
        "--target",
        &format!("{target}?{parameters}"),
        "--table",
        "public.t",
    ])
}

/// Writers that came in since the log was `before` long, and how many of them were encrypted.
fn writers(pair: &Pair, before: usize) -> (usize, usize) {
    let log = pair.target_cluster.log();
    let lines: Vec<&str> = log[before..]
        .lines()
        .filter(|line| line.contains("connection authorized") && line.contains("pg-dedup-migrate/writer"))
        .collect();
    (lines.len(), lines.iter().filter(|line| line.contains("SSL enabled")).count())
}

#[tokio::test(flavor = "multi_thread")]
async fn sslmode_means_what_it_says() {
    let mut pair = Pair::start().await;
    pair.both("CREATE TABLE public.t (id int PRIMARY KEY, x text)").await;
    pair.source.exec("INSERT INTO public.t SELECT n, 'x' || n FROM generate_series(1, 100) AS n").await;
    let ours = Authority::new("ours");
    let other = Authority::new("other");
    ours.certify(&pair.target_cluster);
    pair.reconnect_target().await;
    let root = |authority: &Authority| format!("sslrootcert={}", authority.file.display());

    let accepted = [
        ("127.0.0.1", "sslmode=require".to_owned(), true),
        ("127.0.0.1", "sslmode=prefer".to_owned(), true),
        ("127.0.0.1", "sslmode=disable".to_owned(), false),
        ("127.0.0.1", format!("sslmode=verify-ca&{}", root(&ours)), true),
        ("localhost", format!("sslmode=verify-full&{}", root(&ours)), true),
    ];
    for (host, parameters, encrypted) in accepted {
        let before = pair.target_cluster.log().len();
        run(&pair, host, &parameters).exits(exit::DONE).await;
        let (all, with_tls) = writers(&pair, before);
        assert!(all > 0, "{parameters}: nobody wrote");
        assert_eq!(with_tls, if encrypted { all } else { 0 }, "{parameters}");
    }

    let runs: i64 = pair.target.one("SELECT count(*) FROM dedup.runs").await;
    let refused = [
        ("127.0.0.1", format!("sslmode=verify-ca&{}", root(&other)), "invalid peer certificate"),
        // libpq checks the authority as soon as one is named.
        ("127.0.0.1", format!("sslmode=require&{}", root(&other)), "invalid peer certificate"),
        ("127.0.0.1", format!("sslmode=verify-full&{}", root(&ours)), "not valid for name"),
    ];
    for (host, parameters, says) in refused {
        run(&pair, host, &parameters).exits(exit::ERROR).await.says(says);
    }
    run(&pair, "localhost", "sslmode=verify-full&sslrootcert=/nowhere.crt")
        .exits(exit::USAGE)
        .await
        .says("/nowhere.crt");
    assert_eq!(pair.target.one::<i64>("SELECT count(*) FROM dedup.runs").await, runs);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tls_is_refused_where_tls_is_asked_for() {
    let pair = Pair::start().await;
    pair.both("CREATE TABLE public.t (id int PRIMARY KEY, x text)").await;
    run(&pair, "127.0.0.1", "sslmode=require").exits(exit::ERROR).await.says("TLS");
    run(&pair, "127.0.0.1", "sslmode=prefer").exits(exit::DONE).await;
    assert_eq!(
        Db::connect(&pair.target_cluster, DATABASE).await.one::<i64>("SELECT count(*) FROM dedup.runs").await,
        1
    );
}
