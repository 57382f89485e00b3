//! Models and API keys that change while the server runs, without a restart.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rerankd::api::{App, Keys, Origins};
use rerankd::served::Models;
use serde_json::{Value, json};

use crate::support::server::{Server, rerankd, scores_of};
use crate::support::stub::{self, LIMITS, QUEUE};
use crate::support::{self, SplitMix64};

/// Logged when a reload has succeeded.
const DONE: &str = "the settings were read again";

/// A server with a config file.
struct Reloaded {
    server: Server,
    folder: tempfile::TempDir,
}

impl Reloaded {
    fn start(config: &str) -> Self {
        Self::start_in(config, &[])
    }

    fn start_in(config: &str, environment: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rerankd.toml");
        std::fs::write(&path, config).unwrap();
        Self { server: Server::start_in(&["--config", path.to_str().unwrap()], environment), folder }
    }

    /// Writes another config file, sends SIGHUP, and returns the log up to the line that contains `text`.
    fn reload(&mut self, config: &str, text: &str) -> String {
        self.write(config);
        self.server.signal("-HUP");
        self.server.log_until(text)
    }

    fn write(&self, config: &str) {
        std::fs::write(self.folder.path().join("rerankd.toml"), config).unwrap();
    }

    /// Names of the served models.
    fn models(&self) -> Vec<String> {
        let answer = self.server.get("/v1/models");
        let json: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        json["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
    }

    fn ask(&self, model: &str) -> String {
        self.server.rerank(&body(model))
    }

    /// Threads of this name.
    fn threads(&self, name: &str) -> usize {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.server.child.id())).unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|own| own.trim() == name).count()
    }
}

fn body(model: &str) -> String {
    json!({"model": model, "query": "Apple", "documents": ["apple", "banana", "fruit"]}).to_string()
}

/// A model argument for a fixture, under a name.
fn named(name: &str, fixture: &str) -> String {
    format!("{name}={}", support::fixture(fixture).display())
}

fn config(models: &[String]) -> String {
    format!("model = {models:?}\n")
}

#[test]
fn a_reload_adds_and_removes_models_and_keeps_the_others() {
    let (one, two, three) = (named("one", "xlmr"), named("two", "bert"), named("three", "roberta"));
    let mut reloaded = Reloaded::start(&config(&[one.clone(), two.clone()]));
    let before = scores_of(&reloaded.ask("two"));
    let workers = reloaded.threads("worker");
    let log = reloaded.reload(&config(&[three.clone(), two.clone()]), DONE);
    assert_eq!(reloaded.models(), ["three", "two"]);
    assert!(log.contains("layers of hidden size"), "the new model is described: {log}");
    assert_eq!(log.matches("loaded in").count(), 1, "the model that stays is not loaded again: {log}");
    assert_eq!(scores_of(&reloaded.ask("two")), before);
    assert!(reloaded.ask("three").starts_with("HTTP/1.1 200"));
    assert!(reloaded.ask("one").contains("does not exist"));
    assert!(reloaded.server.get("/info").contains(r#""model_id":"three""#));
    assert!(reloaded.server.log_until("unloaded").contains("one"));
    assert_eq!(reloaded.threads("worker"), workers, "the workers of the removed model have ended");
    while reloaded.threads("watchdog") > 2 {
        std::thread::yield_now();
    }
    for path in ["/health", "/ready"] {
        assert!(reloaded.server.get(path).starts_with("HTTP/1.1 200"));
    }
}

#[test]
fn an_alias_moves_to_another_model_without_loading_one() {
    let models = config(&[named("old", "xlmr"), named("new", "bert")]);
    let mut reloaded = Reloaded::start(&format!("{models}alias = \"prod=old\"\n"));
    assert!(reloaded.ask("prod").contains(r#""model":"old""#));
    let log = reloaded.reload(&format!("{models}alias = \"prod=new\"\n"), DONE);
    assert!(!log.contains("loaded in") && !log.contains("no longer served"), "{log}");
    assert!(reloaded.ask("prod").contains(r#""model":"new""#));
}

#[test]
fn a_config_file_that_cannot_be_used_changes_nothing_and_the_log_says_why() {
    let one = named("one", "xlmr");
    let mut reloaded = Reloaded::start(&config(std::slice::from_ref(&one)));
    let before = scores_of(&reloaded.ask("one"));
    let damaged = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(support::fixture("xlmr").join(file), damaged.path().join(file)).unwrap();
    }
    std::fs::write(damaged.path().join("model.safetensors"), "damaged").unwrap();
    let damaged = format!("damaged={}", damaged.path().display());
    for (config, reason) in [
        ("model = [".to_owned(), "not valid TOML"),
        ("modle = \"rerankd-mini\"".to_owned(), "modle"),
        ("max-documents = \"x\"".to_owned(), "invalid value 'x' for '--max-documents"),
        (String::new(), "there is no --model any more"),
        (config(&["nothing-here".to_owned()]), "nothing-here"),
        (config(&[one.clone(), damaged]), "model.safetensors"),
        (config(&[one.clone(), named("ONE", "bert")]), "two models are called \"ONE\""),
    ] {
        let log = reloaded.reload(&config, "SIGHUP: ");
        let line = log.lines().last().unwrap();
        assert!(line.contains("ERROR") && line.contains(reason), "{config}: {line}");
        assert!(line.contains("nothing is changed") || line.contains("stay as they are"), "{config}: {line}");
        assert_eq!(reloaded.models(), ["one"]);
        assert_eq!(scores_of(&reloaded.ask("one")), before);
    }
    reloaded.reload(&config(&[named("two", "bert")]), DONE);
    assert_eq!(reloaded.models(), ["two"], "a later reload succeeds");
}

#[test]
fn api_keys_change_without_a_restart_and_other_settings_are_reported() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "first-key-of-many-characters\n").unwrap();
    let config = format!("api-key-file = {:?}\n", keys.path());
    let mut reloaded = Reloaded::start(&config);
    let status = |server: &Server, key: &str| {
        let request = format!("GET /info HTTP/1.1\r\nhost: h\r\nx-api-key: {key}\r\nconnection: close\r\n\r\n");
        server.request(&request)[9..12].to_owned()
    };
    assert_eq!(status(&reloaded.server, "first-key-of-many-characters"), "200");
    std::fs::write(keys.path(), "other-key-of-many-characters\n").unwrap();
    let log = reloaded.reload(&format!("{config}max-documents = 5\nlog = \"debug\"\nthreads = 1\n"), DONE);
    for flag in ["--max-documents", "--log", "--threads"] {
        assert!(log.contains(&format!("{flag} has changed; that needs a restart")), "{flag}: {log}");
    }
    assert_eq!(log.matches("needs a restart").count(), 3, "{log}");
    assert_eq!(status(&reloaded.server, "first-key-of-many-characters"), "401");
    assert_eq!(status(&reloaded.server, "other-key-of-many-characters"), "200");
    // Without the file the server would be open to everyone.
    let log = reloaded.reload("", DONE);
    assert!(log.contains("the API keys stay as they are"), "{log}");
    assert_eq!(status(&reloaded.server, "first-key-of-many-characters"), "401");
    // Nor does an empty file open it.
    std::fs::write(keys.path(), "# none\n").unwrap();
    let log = reloaded.reload(&config, "nothing is changed");
    assert!(log.contains("contains no key") && !log.contains("other-key"), "{log}");
    assert_eq!(status(&reloaded.server, "other-key-of-many-characters"), "200");
}

/// A hub that accepts connections and never answers.
struct SilentHub {
    listener: TcpListener,
    endpoint: String,
    home: tempfile::TempDir,
}

impl SilentHub {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        Self { listener, endpoint, home: tempfile::tempdir().unwrap() }
    }

    fn environment(&self) -> [(&str, &str); 3] {
        let home = self.home.path().to_str().unwrap();
        [("HF_ENDPOINT", &self.endpoint), ("HF_HOME", home), ("HF_HUB_OFFLINE", "0")]
    }
}

#[test]
fn while_a_model_is_loading_the_others_serve_and_sigterm_ends_the_server() {
    let hub = SilentHub::new();
    let mut reloaded = Reloaded::start_in("", &hub.environment());
    reloaded.write("model = [\"rerankd-mini\", \"org/small\"]\n");
    reloaded.server.signal("-HUP");
    let _asked = hub.listener.accept().unwrap(); // loading has begun, and cannot end
    reloaded.server.signal("-HUP");
    for path in ["/health", "/ready"] {
        assert!(reloaded.server.get(path).starts_with("HTTP/1.1 200"));
    }
    assert!(reloaded.ask("rerankd-mini").starts_with("HTTP/1.1 200"));
    assert_eq!(reloaded.models(), ["rerankd-mini"]);
    reloaded.server.signal("-TERM");
    assert_eq!(reloaded.server.exit_code(), Some(0));
}

#[test]
fn sighup_while_the_first_models_are_loading_does_not_end_the_server() {
    let hub = SilentHub::new();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = rerankd();
    command.args(["serve", "--model", "org/small", "--port", &address.port().to_string()]).envs(hub.environment());
    let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    let _asked = hub.listener.accept().unwrap();
    let signal = |name: &str| {
        let id = child.id().to_string();
        assert!(std::process::Command::new("kill").args([name, &id]).status().unwrap().success());
    };
    (0..3).for_each(|_| signal("-HUP"));
    signal("-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn several_signals_at_once_end_in_the_newest_settings() {
    let mut reloaded = Reloaded::start(&config(&[named("one", "xlmr")]));
    for name in ["two", "three", "four"] {
        reloaded.write(&config(&[named(name, "bert")]));
        reloaded.server.signal("-HUP");
    }
    reloaded.server.log_until("models=\"four\"");
    assert_eq!(reloaded.models(), ["four"]);
}

#[test]
fn requests_keep_being_answered_by_their_model_while_models_come_and_go() {
    let (stays, goes) = (named("stays", "xlmr"), named("goes", "bert"));
    let both = config(&[goes, stays.clone()]);
    let mut reloaded = Reloaded::start(&both);
    let expected: Vec<Vec<f64>> = ["stays", "goes"].map(|model| scores_of(&reloaded.ask(model))).into();
    let (done, address) = (Arc::new(AtomicBool::new(false)), reloaded.server.address().to_owned());
    let client = |(model, expected): (&'static str, Vec<f64>)| {
        let (done, address) = (Arc::clone(&done), address.clone());
        std::thread::spawn(move || {
            let (mut answered, mut refused) = (0, 0);
            while !done.load(Ordering::Relaxed) || answered == 0 {
                let answer = support::server::post(&address, &body(model));
                if model == "goes" && answer.contains("does not exist") {
                    refused += 1;
                    continue;
                }
                assert_eq!(scores_of(&answer), expected, "{model}: {answer}");
                answered += 1;
            }
            (answered, refused)
        })
    };
    let clients: Vec<_> =
        ["stays", "goes", "stays", "goes"].into_iter().zip(expected.into_iter().cycle()).map(client).collect();
    for _ in 0..5 {
        reloaded.reload(&config(std::slice::from_ref(&stays)), "unloaded");
        reloaded.reload(&both, DONE);
    }
    done.store(true, Ordering::Relaxed);
    for client in clients {
        let (answered, refused) = client.join().unwrap();
        eprintln!("{answered} requests answered, {refused} refused because their model was not served");
    }
}

fn app() -> Arc<App> {
    App::new(Keys::default(), LIMITS, None, Origins::default())
}

#[tokio::test]
async fn a_request_is_answered_by_the_model_that_it_began_with() {
    let app = app();
    let (old, watch) = stub::model("m", 0.0, QUEUE);
    let (new, _) = stub::model("m", 2.0, QUEUE);
    let kept = old.clone();
    app.set_models(Models::new(vec![old]).unwrap());
    let ask = json!({"model": "m", "query": "apple", "documents": ["apple"]});
    let gate = watch.close_gate();
    let running = tokio::spawn({
        let (app, ask) = (Arc::clone(&app), ask.clone());
        async move { stub::rerank(&app, ask).await }
    });
    watch.batch_started().await;
    app.set_models(Models::new(vec![new]).unwrap());
    assert_eq!(stub::rerank(&app, ask).await.score(0), sigmoid(2.0), "the new model answers at once");
    assert!(Arc::strong_count(&kept.scheduler) > 1, "the request uses the old model");
    drop(gate);
    assert_eq!(running.await.unwrap().score(0), sigmoid(0.0));
    assert_eq!(Arc::strong_count(&kept.scheduler), 1, "nothing else holds the old model");
}

fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

/// Every set has the models `a`, `b` and `c` in some order, or some of them, each with logits of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_request_fails_or_gets_scores_of_another_model_over_random_swaps() {
    let app = app();
    let mut random = SplitMix64(7);
    let models = ["a", "b", "c"].map(|name| stub::model(name, f32::from(name.as_bytes()[0] - b'a'), QUEUE).0);
    app.set_models(Models::new(models.to_vec()).unwrap());
    let done = Arc::new(AtomicBool::new(false));
    let client = |seed: u64| {
        let (app, done) = (Arc::clone(&app), Arc::clone(&done));
        tokio::spawn(async move {
            let mut random = SplitMix64(seed);
            let mut answered = 0;
            while !done.load(Ordering::Relaxed) || answered == 0 {
                let model = random.below(3);
                let name = ["a", "b", "c"][model];
                let answer =
                    stub::rerank(&app, json!({"model": name, "query": "apple red", "documents": ["apple", "x"]})).await;
                if answer.text.contains("does not exist") {
                    continue;
                }
                assert_eq!([answer.score(0), answer.score(1)], [sigmoid(model as f64), sigmoid(model as f64 - 1.0)]);
                answered += 1;
            }
            answered
        })
    };
    let clients: Vec<_> = (0..6).map(client).collect();
    for _ in 0..500 {
        let mut set = models.to_vec();
        for i in 0..3 {
            let j = random.below(3);
            set.swap(i, j);
        }
        set.truncate(1 + random.below(3));
        app.set_models(Models::new(set).unwrap());
        tokio::task::yield_now().await;
    }
    app.set_models(Models::new(models.to_vec()).unwrap());
    done.store(true, Ordering::Relaxed);
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
}
