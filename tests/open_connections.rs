//! Connections that stay open, and what was true of their callers when they began.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use omsign_fixtures::ca::{Ca, write_chain, write_key};
use omsign_fixtures::softhsm::KeyType;
use omsign_tests::agent::{Agent, SOON, eventually};
use omsign_tests::operator::does;
use omsign_tests::world::{World, key_section, token_section};
use openssl::pkey::{PKey, Private};
use openssl::ssl::{SslConnector, SslFiletype, SslMethod, SslStream};
use openssl::x509::X509;

/// An HTTP/2 connection with a client's certificate.
struct Open(SslStream<TcpStream>);

impl Open {
    fn new(world: &World, url: &str, client: &str) -> anyhow::Result<Self> {
        let mut connector = SslConnector::builder(SslMethod::tls_client())?;
        connector.set_ca_file(world.path("a-server-ca.pem"))?;
        connector.set_certificate_chain_file(world.path(&format!("{client}.pem")))?;
        connector.set_private_key_file(world.path(&format!("{client}.key")), SslFiletype::PEM)?;
        connector.set_alpn_protos(b"\x02h2")?;
        let address = url.trim_start_matches("https://");
        let socket = TcpStream::connect(address)?;
        socket.set_read_timeout(Some(SOON))?;
        let mut stream = connector.build().connect("localhost", socket)?;
        // The preface, and SETTINGS without any (RFC 9113, 3.4 and 6.5).
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
        Ok(Self(stream))
    }

    /// Whether a PING is answered (RFC 9113, 6.7), or the connection is over.
    fn answers(&mut self) -> anyhow::Result<bool> {
        let said = b"to and fro";
        let said = said.get(..8).context("eight bytes")?;
        if self.0.write_all(&[b"\0\0\x08\x06\0\0\0\0\0", said].concat()).is_err() {
            return Ok(false);
        }
        let (mut heard, mut piece) = (Vec::new(), [0; 1024]);
        loop {
            match self.0.read(&mut piece) {
                Ok(0) => return Ok(false),
                Ok(count) => heard.extend_from_slice(piece.get(..count).unwrap_or_default()),
                Err(error) => {
                    let waits =
                        matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut);
                    ensure!(!waits, "neither answered nor closed");
                    return Ok(false);
                }
            }
            if heard.windows(8).any(|window| window == said) {
                return Ok(true);
            }
        }
    }
}

/// A caller whose certificate has expired, or whose CA is trusted no more, is not served on by a connection of before.
#[test]
fn certificates_that_are_over() -> anyhow::Result<()> {
    let world = World::new()?;
    let (servers, ours, theirs) = (Ca::create("servers")?, Ca::create("ours")?, Ca::create("theirs")?);
    let (certificate, key) = servers.server("server")?;
    write_chain(&world.path("a-server-ca.pem"), &[&servers.certificate])?;
    write_chain(&world.path("server.pem"), &[&certificate])?;
    write_key(&world.path("server.key"), &key)?;
    let clients = [("ours", ours.client("ours")?), ("theirs", theirs.client("theirs")?)];
    let keep = |name: &str, (certificate, key): (X509, PKey<Private>)| {
        write_chain(&world.path(&format!("{name}.pem")), &[&certificate])?;
        write_key(&world.path(&format!("{name}.key")), &key)
    };
    clients.into_iter().try_for_each(|(name, client)| keep(name, client))?;
    write_chain(&world.path("clients.pem"), &[&ours.certificate, &theirs.certificate])?;
    let tls = "tls = { address = \"127.0.0.1:0\", certificate = \"server.pem\", private_key = \"server.key\", \
               client_ca = \"clients.pem\" }";
    let listen = world.listen().replacen("[listen]\n", &format!("[listen]\n{tls}\n"), 1);
    let token = world.token("t", "k", KeyType::P256)?;
    let config = listen + &token_section("t", &token, "") + &key_section("k", "t", "k");
    let agent = Agent::start(&world, &config)?;
    let url = agent.tls_url()?;
    let open = |client| Open::new(&world, &url, client);
    let (mut of_ours, mut of_theirs) = (open("ours")?, open("theirs")?);
    ensure!(of_ours.answers()? && of_theirs.answers()?);
    // Only one of the two CAs is trusted from here on.
    write_chain(&world.path("clients.pem"), &[&ours.certificate])?;
    does(&world, &["reload"])?;
    ensure!(!of_theirs.answers()? && of_ours.answers()?);
    let soon = Duration::from_secs(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() + 5);
    keep("brief", ours.client_until("brief", soon)?)?;
    let mut brief = open("brief")?;
    ensure!(brief.answers()?);
    eventually("the end of a certificate", || Ok(!brief.answers()?))?;
    ensure!(SystemTime::now().duration_since(UNIX_EPOCH)? >= soon && of_ours.answers()?);
    ensure!(agent.log()?.matches("it is cut off").count() == 2, "{}", agent.log()?);
    Ok(())
}
