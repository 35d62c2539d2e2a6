//! What only TPMs and cards do when they fail. What any device may do is in `fault_matrix.rs`.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use omsign_fixtures::piv::{self, VirtualPiv};
use omsign_fixtures::softhsm::KeyType;
use omsign_fixtures::swtpm::{AUTH, SwTpm};
use omsign_fixtures::{built, write_private};
use omsign_proto::v1::sign_response::Event;
use omsign_tests::agent::{Agent, eventually};
use omsign_tests::client::{connect, next_event, request, sign};
use omsign_tests::device::{Device, card};
use omsign_tests::lab::{OTHERS, timeout};
use omsign_tests::world::{World, key, key_section, token_section};
use tonic::Code;

const SECOND: Duration = Duration::from_secs(1);
const DIGEST: [u8; 32] = [7; 32];

/// An agent for one device and a calm token, and one request after another.
struct Bench {
    world: World,
    agent: Agent,
    runtime: tokio::runtime::Runtime,
    next_id: u128,
}

impl Bench {
    fn new(world: World, device: &Device) -> anyhow::Result<Self> {
        let calm = world.token("calm", "calm", KeyType::P256)?;
        let config = world.listen() + &device.token + &timeout() + &device.keys;
        let calm_too = token_section("calm", &calm, "") + &key_section("calm", "calm", "calm");
        let agent = Agent::start(&world, &(config + &calm_too))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut bench = Self { world, agent, runtime, next_id: 0 };
        // From here on it is open.
        let opened = bench.asks("calm", SECOND * 20)?;
        ensure!(opened == Ok(()), "{opened:?}");
        Ok(bench)
    }

    /// Has the P-256 key sign; the error is its code.
    fn sign(&mut self) -> anyhow::Result<Result<(), Code>> {
        self.asks("p256", SECOND * 20)
    }

    fn asks(&mut self, key: &'static str, within: Duration) -> anyhow::Result<Result<(), Code>> {
        self.next_id += 1;
        self.runtime.block_on(ask(self.world.path("agent.sock"), key, self.next_id, within))
    }

    /// Waits until signatures come again, by themselves.
    fn heals(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        while self.sign()?.is_err() {
            ensure!(started.elapsed() < SECOND * 20, "it does not heal: {}", self.agent.log()?);
        }
        Ok(())
    }

    /// It fails so, and others are served meanwhile and after it.
    fn fails(&mut self, code: Code) -> anyhow::Result<()> {
        self.next_id += 2;
        let socket = || self.world.path("agent.sock");
        let (signed, other) = self.runtime.block_on(async {
            let one = ask(socket(), "p256", self.next_id - 1, SECOND * 20);
            tokio::join!(one, ask(socket(), "calm", self.next_id, OTHERS))
        });
        let (signed, other) = (signed?, other?);
        ensure!(signed == Err(code), "{signed:?}, not {code:?}: {}", self.agent.log()?);
        ensure!(other == Ok(()), "others: {other:?}");
        self.serves_others()
    }

    fn serves_others(&mut self) -> anyhow::Result<()> {
        let other = self.asks("calm", OTHERS)?;
        ensure!(other == Ok(()), "others: {other:?}");
        Ok(())
    }
}

/// Has a key sign; the error is its code.
async fn ask(socket: PathBuf, key: &str, id: u128, within: Duration) -> anyhow::Result<Result<(), Code>> {
    let mut client = connect(socket).await?;
    let signed = sign(&mut client, request(key, id, &DIGEST), within).await;
    Ok(signed.map(drop).map_err(|status| status.code()))
}

/// Wrong values until the TPM takes none at all, and then its patience again.
#[test]
fn a_lockout_that_ends() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = SwTpm::create(&world.path("tpm"))?;
    stand_in.guarded_key("p256", 0x8100_0010, AUTH)?;
    // Two wrong ones; one is forgiven after five seconds, in which a busy machine offers the next.
    stand_in.tool("tpm2_dictionarylockout", |tool| {
        tool.args(["-s", "-n", "2", "-t", "5", "-l", "1"]);
    })?;
    write_private(&stand_in.pin_file(), b"wrong-auth-8142\n")?;
    let keys = key("p256", "device", "handle = \"0x81000010\"");
    let (token, expected, environment) = (stand_in.section("device"), Vec::new(), Vec::new());
    let mut bench = Bench::new(world, &Device { token, keys, expected, environment, secret: AUTH })?;
    bench.fails(Code::FailedPrecondition)?;
    let locked_out = |bench: &Bench| {
        let errors = bench.world.omsign_fails(2, &["agent", "unlock", "device"])?;
        Ok(errors.contains("in lockout"))
    };
    eventually("a lockout", || locked_out(&bench))?;
    write_private(&stand_in.pin_file(), format!("{AUTH}\n").as_bytes())?;
    eventually("its end", || Ok(bench.world.omsign(&["agent", "unlock", "device"])?.status.success()))?;
    ensure!(bench.sign()? == Ok(()), "{}", bench.agent.log()?);
    Ok(())
}

/// Nobody comes: the card gives up after 15 s, and asks again the next time.
#[test]
fn a_touch_that_never_comes() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    stand_in.change_pin()?;
    stand_in.generate("9a", "ECCP256", &["--touch-policy=always"])?;
    let keys = key("p256", "device", "slot = \"9a\"");
    let (token, expected, environment) = (stand_in.section("device"), Vec::new(), Vec::new());
    let mut bench = Bench::new(world, &Device { token, keys, expected, environment, secret: piv::PIN })?;
    // An agent listens before its tokens are open.
    eventually("an open card", || Ok(bench.world.status()?.contains("token device: ready")))?;
    let hosts = bench.agent.hosts()?;
    bench.fails(Code::FailedPrecondition)?;
    ensure!(bench.agent.hosts()? == hosts, "its process was replaced: {}", bench.agent.log()?);
    let finger = std::thread::scope(|scope| {
        let signed = scope.spawn(|| bench.sign());
        eventually("the card's wait", || Ok(stand_in.waits_for_touch()))?;
        stand_in.touch();
        signed.join().map_err(|_| anyhow::anyhow!("a panic"))?
    })?;
    ensure!(finger == Ok(()), "{finger:?}");
    ensure!(stand_in.pin_tries()? == 3);
    Ok(())
}

/// A key that signs only while the PCRs are as they were when it was made.
#[test]
fn pcrs_that_change() -> anyhow::Result<()> {
    for auth in [true, false] {
        let world = World::new()?;
        let stand_in = SwTpm::create(&world.path("tpm"))?;
        let section = stand_in.section("device");
        let token = match auth {
            true => section,
            false => section
                .lines()
                .filter(|line| !line.starts_with("pin"))
                .map(|line| format!("{line}\n"))
                .collect(),
        };
        let key = |name, object| key(name, "device", object).replace("\n[[", "\npcrs = \"sha256:16,23\"\n[[");
        let keys = key("p256", "handle = \"0x81000010\"") + &key("file", "file = \"file.pem\"");
        world.write("agent.toml", world.listen() + &token + &keys)?;
        for name in ["p256", "file"] {
            let mut make = Command::new(built("omsign-agent")?);
            make.args(["key", "generate", name, "--type", "p256", "--config"]).arg(world.path("agent.toml"));
            world.without_surprises(&mut make);
            let output = make.output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let (expected, environment) = (Vec::new(), Vec::new());
        let mut bench = Bench::new(world, &Device { token, keys, expected, environment, secret: AUTH })?;
        ensure!(bench.sign()? == Ok(()), "{}", bench.agent.log()?);
        let zeros = "0".repeat(64);
        stand_in.tool("tpm2_pcrextend", |tool| {
            tool.arg(format!("23:sha256={zeros}"));
        })?;
        bench.fails(Code::FailedPrecondition)?;
        let errors = bench.world.omsign_fails(2, &["sign", "agent.log", "--key", "file"]);
        ensure!(errors.is_ok_and(|errors| errors.contains("the PCRs sha256:16,23 are not as they were")));
        // It did not count as a wrong authorization value, and heals by itself.
        ensure!(stand_in.failed_tries()? == 0, "{} tries", stand_in.failed_tries()?);
        stand_in.tool("tpm2_pcrreset", |tool| {
            tool.arg("23");
        })?;
        bench.heals()?;
    }
    Ok(())
}

#[test]
fn a_wrong_authorization_value_is_offered_once() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = SwTpm::create(&world.path("tpm"))?;
    // A key that the TPM guards against guessing, and one more that would be the second try.
    stand_in.guarded_key("p256", 0x8100_0010, AUTH)?;
    stand_in.guarded_key("other", 0x8100_0011, AUTH)?;
    write_private(&stand_in.pin_file(), b"wrong-auth-8142\n")?;
    let keys =
        key("p256", "device", "handle = \"0x81000010\"") + &key("other", "device", "handle = \"0x81000011\"");
    let (token, expected, environment) = (stand_in.section("device"), Vec::new(), Vec::new());
    let device = Device { token, keys, expected, environment, secret: AUTH };
    let mut bench = Bench::new(world, &device)?;
    for _ in 0..3 {
        bench.fails(Code::FailedPrecondition)?;
    }
    ensure!(stand_in.failed_tries()? == 1, "{} tries", stand_in.failed_tries()?);
    // None is started that could offer it again.
    eventually("the end of its process", || Ok(bench.agent.hosts()?.len() == 1))?;
    bench.fails(Code::FailedPrecondition)?;
    ensure!(stand_in.failed_tries()? == 1, "{} tries", stand_in.failed_tries()?);
    write_private(&stand_in.pin_file(), format!("{AUTH}\n").as_bytes())?;
    bench.world.omsign_ok(&["agent", "unlock", "device"])?;
    ensure!(bench.sign()? == Ok(()), "{}", bench.agent.log()?);
    ensure!(!bench.agent.log()?.contains("wrong-auth-8142"));
    Ok(())
}

/// Somebody puts another key where one was: nothing is signed in its name.
#[test]
fn a_key_that_is_replaced_on_the_device() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    let device = card(&stand_in)?;
    let mut bench = Bench::new(world, &device)?;
    ensure!(bench.sign()? == Ok(()), "{}", bench.agent.log()?);
    stand_in.generate("9c", "ECCP256", &[])?;
    // The process that knew the old key ends; the next one finds the new one.
    bench.heals()?;
    let log = bench.agent.log()?;
    ensure!(log.contains("the device has another key there than before"), "{log}");
    ensure!(log.contains("the key has another public half than before"), "{log}");
    Ok(())
}

/// gpg's own daemon, which wants the card for itself: it gets one that is idle, and who asks meanwhile is told who has it.
#[test]
fn a_card_that_gpg_takes() -> anyhow::Result<()> {
    use std::io::{BufRead as _, BufReader, Write as _};
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    let device = card(&stand_in)?;
    let mut bench = Bench::new(world, &device)?;
    ensure!(bench.sign()? == Ok(()), "{}", bench.agent.log()?);
    let hosts = bench.agent.hosts()?;
    let mut gpg = Command::new("/usr/lib/gnupg/scdaemon");
    gpg.args(["--server", "--disable-ccid", "--pcsc-driver", "libpcsclite.so.1", "--homedir"]);
    gpg.arg(bench.world.path("card")).env("PCSCLITE_CSOCK_NAME", stand_in.socket());
    let mut gpg = gpg.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let pid = gpg.id();
    let (mut orders, answers) = (gpg.stdin.take().context("stdin")?, gpg.stdout.take().context("stdout")?);
    let mut answers = BufReader::new(answers).lines();
    ensure!(answers.next().context("a greeting")??.starts_with("OK"));
    let mut order = |what: &str| -> anyhow::Result<bool> {
        writeln!(orders, "{what}")?;
        loop {
            let answer = answers.next().context("an answer")??;
            if answer.starts_with("OK") || answer.starts_with("ERR") {
                return Ok(answer.starts_with("OK"));
            }
        }
    };
    eventually("gpg's turn", || order("SERIALNO undefined"))?;
    let errors = bench.world.omsign_fails(2, &["sign", "agent.log", "--key", "p256"])?;
    let mut init = Command::new(built("omsign-agent")?);
    init.args(["init", "yubikey", "--directory"]).arg(bench.world.path("new"));
    let told = init.env("PCSCLITE_CSOCK_NAME", stand_in.socket()).output()?.stderr;
    for errors in [errors, String::from_utf8(told)?] {
        let holder = format!("is in use by another program: scdaemon (process {pid})");
        ensure!(errors.contains(&holder), "{errors}");
    }
    bench.serves_others()?;
    order("BYE")?;
    gpg.wait()?;
    bench.heals()?;
    // Nothing was started over, which a PIN that only a person knows would be asked for.
    ensure!(bench.agent.hosts()? == hosts && stand_in.wrong_pins() == 0, "{}", bench.agent.log()?);
    Ok(())
}

#[test]
fn a_wrong_card_pin_is_offered_once() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    let device = card(&stand_in)?;
    write_private(&stand_in.pin_file(), b"81428142\n")?;
    let mut bench = Bench::new(world, &device)?;
    for _ in 0..3 {
        bench.fails(Code::FailedPrecondition)?;
    }
    ensure!(stand_in.pin_tries()? == 2, "{} tries", stand_in.pin_tries()?);
    // An operator's word is worth one more; the last one is kept.
    let errors = bench.world.omsign_fails(2, &["agent", "unlock", "device"])?;
    ensure!(errors.contains("it refused the PIN; 1 try is left"), "{errors}");
    // None is started that could offer it again.
    eventually("the end of its process", || Ok(bench.agent.hosts()?.len() == 1))?;
    bench.fails(Code::FailedPrecondition)?;
    ensure!(stand_in.pin_tries()? == 1, "{} tries", stand_in.pin_tries()?);
    write_private(&stand_in.pin_file(), format!("{}\n", omsign_fixtures::piv::PIN).as_bytes())?;
    bench.world.omsign_ok(&["agent", "unlock", "device"])?;
    ensure!(bench.sign()? == Ok(()), "{}", bench.agent.log()?);
    ensure!(stand_in.pin_tries()? == 3 && !bench.agent.log()?.contains("81428142"));
    Ok(())
}

#[test]
fn a_card_pin_that_is_changed_meanwhile() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    let device = card(&stand_in)?;
    let mut bench = Bench::new(world, &device)?;
    // 9c asks for the PIN before every signature.
    ensure!(bench.sign()? == Ok(()), "{}", bench.agent.log()?);
    stand_in.tool(&["-a", "change-pin", "-P", omsign_fixtures::piv::PIN, "-N", "55501234"])?;
    for _ in 0..4 {
        bench.fails(Code::FailedPrecondition)?;
    }
    ensure!(stand_in.pin_tries()? == 2, "{} tries", stand_in.pin_tries()?);
    write_private(&stand_in.pin_file(), b"55501234\n")?;
    bench.world.omsign_ok(&["agent", "unlock", "device"])?;
    ensure!(bench.sign()? == Ok(()), "{}", bench.agent.log()?);
    Ok(())
}

#[test]
fn whoever_waits_is_told_to_touch() -> anyhow::Result<()> {
    let world = World::new()?;
    let stand_in = VirtualPiv::create(&world.path("card"), 11_223_344)?;
    let mut device = card(&stand_in)?;
    stand_in.generate("9a", "ECCP256", &["--touch-policy=always"])?;
    device.keys += &key("touch", "device", "slot = \"9a\"");
    device.token += "touch_command = [\"sh\", \"-c\", \"echo \\\"$0\\\" >touched\"]\n";
    let mut bench = Bench::new(world, &device)?;
    ensure!(bench.sign()?.is_ok(), "a key that needs no touch: {}", bench.agent.log()?);
    let socket = bench.world.path("agent.sock");
    bench.runtime.block_on(async {
        let mut client = connect(socket).await?;
        let mut fastest = Duration::MAX;
        // A person takes longer than any operation of the device: that is no hang.
        for (id, walk) in (1_u128..).zip([SECOND * 5, Duration::ZERO, Duration::ZERO]) {
            let started = Instant::now();
            let mut events = client.sign(request("touch", id << 64, &DIGEST)).await?.into_inner();
            let first = next_event(&mut events).await?;
            fastest = fastest.min(started.elapsed());
            let Event::Touch(touch) = first else { anyhow::bail!("{first:?}") };
            ensure!(touch.message == "touch your YubiKey (serial 11223344)", "{touch:?}");
            eventually("the card's wait", || Ok(stand_in.waits_for_touch()))?;
            let walking = Instant::now();
            eventually("a person's walk", || Ok(walking.elapsed() > walk))?;
            stand_in.touch();
            ensure!(matches!(next_event(&mut events).await?, Event::Signed(_)));
        }
        // What a busy machine adds, it does not add each time.
        ensure!(fastest < Duration::from_millis(300), "told after {fastest:?}");
        Ok(())
    })?;
    // Two at once: both are told before anybody touched it, and each signature wants a touch of its own.
    let socket = bench.world.path("agent.sock");
    bench.runtime.block_on(async {
        let mut waiting = Vec::new();
        for id in [4_u128 << 64, 5 << 64] {
            let mut client = connect(socket.clone()).await?;
            waiting.push(client.sign(request("touch", id, &DIGEST)).await?.into_inner());
        }
        for events in &mut waiting {
            ensure!(matches!(next_event(events).await?, Event::Touch(_)));
        }
        let mut signing = tokio::task::JoinSet::new();
        for mut events in waiting {
            signing.spawn(async move { next_event(&mut events).await });
        }
        for _ in 0..2 {
            eventually("the wait of one of two", || Ok(stand_in.waits_for_touch()))?;
            stand_in.touch();
            let last = signing.join_next().await.context("one of two")???;
            ensure!(matches!(last, Event::Signed(_)), "{last:?}");
        }
        anyhow::Ok(())
    })?;
    // And whoever signs at a terminal, with an agent and without.
    let uri = format!("piv:serial=11223344;slot=9a?pin-source={}", stand_in.pin_file().display());
    for key in [["--key", "touch"], ["--key-uri", &uri]] {
        let output = std::thread::scope(|scope| {
            let sign = scope.spawn(|| {
                let mut sign = Command::new(built("omsign")?);
                bench.world.without_surprises(&mut sign);
                sign.env("PCSCLITE_CSOCK_NAME", stand_in.socket()).current_dir(bench.world.path(""));
                anyhow::Ok(sign.args(["sign", "agent.log", "--signature", "touched.sig"]).args(key).output()?)
            });
            eventually("the wait at a terminal", || Ok(stand_in.waits_for_touch()))?;
            stand_in.touch();
            sign.join().map_err(|_| anyhow::anyhow!("a panic"))?
        })?;
        let errors = String::from_utf8_lossy(&output.stderr);
        let told = errors.contains("waiting: touch your YubiKey (serial 11223344)");
        ensure!(output.status.success() && told, "{key:?}: {errors}");
    }
    eventually("the notification", || {
        let said = std::fs::read_to_string(bench.world.path("touched")).unwrap_or_default();
        Ok(said == "touch your YubiKey (serial 11223344)\n")
    })
}
