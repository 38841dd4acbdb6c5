//! A stand-in node for the launcher's tests: it speaks the attached protocol and
//! does nothing else, except what `TREFOIL_FAKE_NODE` tells it to do wrong.
//!
//! `TREFOIL_FAKE_NODE=dealer:die` makes the node with folder `dealer` end before
//! it says where it listens. Others: `silent`, `babble` (a line that is no JSON),
//! `fail` (ends once it was introduced), `stay` (outlives its standard input).
//!
//! `trefoil-fake-node cluster FOLDER` is the parent of such nodes instead: it
//! starts a cluster there, says so in one line, and does not end by itself.

use std::io::{self, BufRead, Read, Write};
use std::net::UdpSocket;
use std::path::Path;
use std::process::ExitCode;

use trefoil_cluster::{Cluster, ClusterSpec, Home};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fake node: {error}");
            ExitCode::from(3)
        }
    }
}

fn run() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [_, folder] = &arguments[..] {
        return run_cluster(folder);
    }
    let [role, config_flag, config, attached] = &arguments[..] else {
        return Err(io::Error::other(format!("arguments: {arguments:?}")));
    };
    if !["party", "dealer"].contains(&role.as_str())
        || config_flag != "--config"
        || attached != "--attached"
    {
        return Err(io::Error::other(format!("arguments: {arguments:?}")));
    }
    std::fs::read_to_string(config)?;
    let folder = Path::new(config).parent().unwrap_or(Path::new("."));
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let fault = std::env::var("TREFOIL_FAKE_NODE").unwrap_or_default();
    let fault = match fault.split_once(':') {
        Some((node, fault)) if node == name => fault,
        _ => "",
    };

    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let mut output = io::stdout();
    match fault {
        "die" => return Err(io::Error::other("the port is taken by the cat")),
        "silent" => {}
        "babble" => writeln!(output, "hello")?,
        _ => writeln!(output, "{{\"listening\":\"{}\"}}", socket.local_addr()?)?,
    }
    output.flush()?;
    if fault != "silent" {
        // Whatever comes after the first line must not block a node.
        output.write_all(&vec![b'\n'; 1 << 18])?;
    }

    let mut input = io::stdin().lock();
    let mut line = String::new();
    input.read_line(&mut line)?;
    std::fs::write(folder.join("introduced.json"), &line)?;
    eprintln!("introduced to {}", line.trim());
    if fault == "fail" {
        return Err(io::Error::other("the share store is full"));
    }
    // Datagrams go back where they came from.
    let echo = move || -> io::Result<()> {
        let mut buffer = [0; 2048];
        loop {
            let (len, from) = socket.recv_from(&mut buffer)?;
            socket.send_to(&buffer[..len], from)?;
        }
    };
    let echo = std::thread::spawn(echo);
    input.read_to_end(&mut Vec::new())?;
    if fault == "stay" {
        // The echo never ends by itself.
        drop(echo.join());
    }
    std::fs::write(folder.join("ended"), "")?;
    Ok(())
}

fn run_cluster(folder: &str) -> io::Result<()> {
    let mut spec = ClusterSpec::new().map_err(io::Error::other)?;
    spec.home = Home::At(folder.into());
    let cluster = Cluster::start(&spec).map_err(io::Error::other)?;
    println!("started");
    loop {
        std::thread::park();
        cluster.check().map_err(io::Error::other)?;
    }
}
