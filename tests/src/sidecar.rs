//! The sidecar as a process: start it, read it, stop it, kill it.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Exit codes, as the design has them.
pub mod exit {
    /// Everything is done.
    pub const DONE: i32 = 0;
    /// An error; for `doctor`, something stands in the way.
    pub const ERROR: i32 = 1;
    /// The command line is wrong.
    pub const USAGE: i32 = 2;
    /// Done, with records left aside.
    pub const LEFT_ASIDE: i32 = 3;
    /// Source and target differ; the run is halted.
    pub const HALTED: i32 = 4;
}

/// Points inside a chunk at which a sidecar built with the feature `failpoints` can be made to stand still, in
/// the order it passes them.
pub mod failpoint {
    /// The chunk is leased, nothing of it is read.
    pub const LEASED: &str = "leased";
    /// The chunk's records are read and hashed.
    pub const READ: &str = "read";
    /// `begin_chunk` has returned.
    pub const BEGUN: &str = "begun";
    /// `claim` has returned.
    pub const CLAIMED: &str = "claimed";
    /// Half of the new rows are sent.
    pub const MIDDLE_OF_COPY: &str = "middle_of_copy";
    /// All new rows are written.
    pub const COPIED: &str = "copied";
    /// `resolve` has returned.
    pub const RESOLVED: &str = "resolved";
    /// `finish_chunk` comes next.
    pub const BEFORE_FINISH: &str = "before_finish";
    /// `finish_chunk` has returned.
    pub const BEFORE_COMMIT: &str = "before_commit";
    /// The chunk is committed.
    pub const AFTER_COMMIT: &str = "after_commit";
}

/// How long a run in a test may take before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(180);

/// The build for use, and the one that knows failpoints.
#[derive(Clone, Copy, Debug)]
enum Build {
    Release,
    Failpoints,
}

impl Build {
    /// Where the binary is: named by the environment, else beside the tests.
    fn path(self) -> PathBuf {
        let (variable, profile) = match self {
            Build::Release => ("PG_DEDUP_MIGRATE", "release"),
            Build::Failpoints => ("PG_DEDUP_MIGRATE_FAILPOINTS", "debug"),
        };
        if let Some(path) = std::env::var_os(variable) {
            return PathBuf::from(path);
        }
        let executable =
            std::env::current_exe().unwrap_or_else(|error| panic!("no path of this test: {error}"));
        // target/debug/deps/integration-… → target
        let target = executable.ancestors().nth(3).map(PathBuf::from).unwrap_or_default();
        target.join(profile).join("pg-dedup-migrate")
    }
}

/// A command line in the making.
#[derive(Clone, Debug)]
pub struct Invocation {
    build: Build,
    arguments: Vec<String>,
    environment: BTreeMap<String, String>,
    in_terminal: bool,
}

impl Invocation {
    /// `pg-dedup-migrate COMMAND`.
    pub fn new(command: &str) -> Self {
        let arguments = vec![command.to_string()];
        Invocation { build: Build::Release, arguments, environment: BTreeMap::new(), in_terminal: false }
    }

    /// Adds one argument.
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds several arguments.
    pub fn args(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|argument| argument.to_string()));
        self
    }

    /// `--workers N`.
    pub fn workers(self, workers: usize) -> Self {
        self.arg("--workers").arg(workers.to_string())
    }

    /// `--chunk-size SIZE`.
    pub fn chunk_size(self, size: &str) -> Self {
        self.arg("--chunk-size").arg(size)
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.insert(name.to_string(), value.into());
        self
    }

    /// Its standard output and error are a terminal's, which come together as [`Output::stdout`]. Arguments have no spaces.
    pub fn in_terminal(mut self) -> Self {
        self.in_terminal = true;
        self
    }

    /// Starts a process that stands still when it reaches a failpoint (`name`, or `name@3`: the third time), and
    /// returns when it does.
    pub async fn stands_at(mut self, failpoint: &str) -> Sidecar {
        self.build = Build::Failpoints;
        let mut sidecar = self.env("PG_DEDUP_MIGRATE_FAILPOINT", failpoint).spawn();
        let name = failpoint.split('@').next().unwrap_or(failpoint);
        sidecar.wait_for(&format!("failpoint {name}\n")).await;
        sidecar
    }

    /// Has a process killed with SIGKILL at a failpoint.
    pub async fn killed_at(self, failpoint: &str) -> Output {
        let sidecar = self.stands_at(failpoint).await;
        sidecar.kill();
        sidecar.finish().await
    }

    /// Starts the process.
    pub fn spawn(&self) -> Sidecar {
        let mut command;
        if self.in_terminal {
            command = Command::new("script");
            command.args(["-q", "-e", "-f", "-c", "set -f; exec $COMMAND_LINE", "/dev/null"]);
            let words = self.arguments.join(" ");
            command.env("COMMAND_LINE", format!("{} {words}", self.build.path().display()));
        } else {
            command = Command::new(self.build.path());
            command.args(&self.arguments);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // What libpq would read from the environment of whoever runs the tests.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PG")) {
            command.env_remove(name);
        }
        command.envs(&self.environment).kill_on_drop(true);
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}; make test builds it"));
        let stderr = Arc::new(Mutex::new(String::new()));
        let stdout = Arc::new(Mutex::new(String::new()));
        let readers = vec![
            collect(child.stdout.take().expect("standard output is piped"), Arc::clone(&stdout)),
            collect(child.stderr.take().expect("standard error is piped"), Arc::clone(&stderr)),
        ];
        Sidecar { arguments: self.arguments.clone(), child, stdout, stderr, readers }
    }

    /// Runs the process to its end.
    pub async fn output(&self) -> Output {
        self.spawn().finish().await
    }

    /// Runs the process to its end, which has to be the given exit code.
    pub async fn exits(&self, code: i32) -> Output {
        let output = self.output().await;
        assert_eq!(output.code, Some(code), "exit code of {:?}\n{}", self.arguments, output.describe());
        output
    }
}

/// Appends what a pipe delivers, line by line so that a test can wait for a line.
fn collect(pipe: impl AsyncRead + Unpin + Send + 'static, into: Arc<Mutex<String>>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        // A read error is the end of the pipe as far as a test is concerned.
        while reader.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
            into.lock().unwrap_or_else(PoisonError::into_inner).push_str(&String::from_utf8_lossy(&line));
            line.clear();
        }
        drop(reader.read_to_end(&mut line).await);
    })
}

/// A running sidecar; killed when dropped.
pub struct Sidecar {
    arguments: Vec<String>,
    child: Child,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

/// What a sidecar left behind.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Everything, for a failing assertion.
    pub fn describe(&self) -> String {
        format!(
            "code {:?}, signal {:?}\n--- stdout\n{}\n--- stderr\n{}",
            self.code, self.signal, self.stdout, self.stderr
        )
    }

    /// Standard output as the one JSON object that `--json` prints.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(self.stdout.trim())
            .unwrap_or_else(|error| panic!("not one JSON object: {error}\n{}", self.describe()))
    }

    /// Asserts that standard error mentions a text.
    pub fn says(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "nothing about {text:?}\n{}", self.describe());
        self
    }
}

impl Sidecar {
    fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let Some(pid) = pid else {
            panic!("{:?} has ended already\n{}", self.arguments, self.stderr());
        };
        kill_process(pid, signal).unwrap_or_else(|error| panic!("cannot signal the sidecar: {error}"));
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// SIGINT, as Ctrl-C sends it.
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    /// SIGSTOP: the process stands still, its connections stay.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn wake(&self) {
        self.signal(Signal::CONT);
    }

    /// Standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until standard error mentions a text.
    pub async fn wait_for(&mut self, text: &str) {
        let waited = timeout(PATIENCE, async {
            loop {
                if self.stderr().contains(text) {
                    return true;
                }
                if matches!(self.child.try_wait(), Ok(Some(_))) {
                    // Its last words may still be in the pipe.
                    sleep(Duration::from_millis(100)).await;
                    return self.stderr().contains(text);
                }
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        assert_eq!(waited, Ok(true), "never said {text:?}: {:?}\n{}", self.arguments, self.stderr());
    }

    /// Waits for the end.
    pub async fn finish(mut self) -> Output {
        let status = match timeout(PATIENCE, self.child.wait()).await {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => panic!("cannot wait for {:?}: {error}", self.arguments),
            Err(_) => panic!("{:?} hangs\n{}", self.arguments, self.stderr()),
        };
        for reader in self.readers {
            drop(reader.await);
        }
        let text =
            |shared: &Arc<Mutex<String>>| shared.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Output {
            code: status.code(),
            signal: status.signal(),
            stdout: text(&self.stdout),
            stderr: text(&self.stderr),
        }
    }
}
