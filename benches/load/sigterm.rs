//! SIGTERM under load, again and again (goal G8 of docs/reliability.md): every request that was sent before the signal is
//! answered; later ones get an answer, or find the port closed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::client::{Answer, answer_of, connect, read_response, requests};
use super::report::{median, ms, quantile, sorted};
use super::server::ServerArgs;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Starts and stops of the server
    #[arg(long, default_value_t = 100)]
    cycles: usize,
    /// Clients; half of them keep their connections, half open one for each request
    #[arg(long, default_value_t = 16)]
    clients: usize,
}

/// A request of one cycle.
struct Sent {
    /// When its last byte was handed to the kernel, or writing failed; `None` if there was no connection.
    at: Option<Instant>,
    /// Whether it was sent on a connection that had served another request.
    is_reused: bool,
    answer: Answer,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let requests = requests("/v1/rerank", "rerankd-mini", 4, 40);
    let mut counts: BTreeMap<(&str, String), usize> = BTreeMap::new();
    let (mut exits, mut codes) = (Vec::new(), BTreeMap::<Option<i32>, usize>::new());
    for _ in 0..args.cycles {
        let mut server = args.server.start(&[])?;
        let log: Arc<Mutex<Vec<Sent>>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let clients: Vec<_> = (0..args.clients)
            .map(|i| {
                let (address, requests) = (server.address.clone(), Arc::clone(&requests));
                tokio::spawn(ask_until(address, requests, i, Arc::clone(&log), Arc::clone(&stop)))
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(fastrand::u64(100..600))).await;
        let signal = Instant::now();
        server.terminate()?;
        let (code, exited) = tokio::task::block_in_place(|| (server.wait(), Instant::now()));
        exits.push(ms(exited - signal));
        *codes.entry(code?).or_default() += 1;
        stop.store(true, Relaxed);
        for client in clients {
            client.await?;
        }
        for sent in log.lock().expect("no client panicked").drain(..) {
            let when = match sent.at {
                Some(at) if at < signal => "sent before the signal",
                Some(_) if sent.is_reused => "sent after it, on a kept connection",
                _ => "sent after it, on a new connection",
            };
            *counts.entry((when, format!("{:?}", sent.answer))).or_default() += 1;
        }
    }
    println!("{} cycles, {} clients", args.cycles, args.clients);
    println!("| request | answer | count |\n|---|---|---|");
    for ((when, answer), count) in counts {
        println!("| {when} | {answer} | {count} |");
    }
    let worst = quantile(&sorted(exits.clone()), 1.0);
    println!("exit: median {:.0} ms, longest {worst:.0} ms; exit codes {codes:?}", median(exits));
    Ok(())
}

/// Sends requests, one after another, until the port is closed or `stop` is set. A client with an even number keeps
/// its connection.
async fn ask_until(
    address: String,
    requests: Arc<Vec<Vec<u8>>>,
    client: usize,
    log: Arc<Mutex<Vec<Sent>>>,
    stop: Arc<AtomicBool>,
) {
    let mut kept: Option<TcpStream> = None;
    for i in 0.. {
        if stop.load(Relaxed) {
            return;
        }
        let is_reused = kept.is_some();
        let (at, result) = send(&address, kept.take(), &requests[(client + i) % requests.len()]).await;
        let answer = match result {
            Ok((status, connection)) => {
                kept = connection.filter(|_| client.is_multiple_of(2));
                Answer::Status(status)
            }
            Err(error) => answer_of(&error),
        };
        log.lock().expect("no client panicked").push(Sent { at, is_reused, answer });
        if answer == Answer::Refused {
            return;
        }
    }
}

async fn send(
    address: &str,
    kept: Option<TcpStream>,
    request: &[u8],
) -> (Option<Instant>, std::io::Result<(u16, Option<TcpStream>)>) {
    let connected = match kept {
        Some(stream) => Ok(stream),
        None => connect(address).await,
    };
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(error) => return (None, Err(error)),
    };
    if let Err(error) = stream.write_all(request).await {
        return (Some(Instant::now()), Err(error));
    }
    let at = Instant::now();
    (Some(at), read_response(stream).await.map(|response| (response.status, response.connection)))
}
