//! Bundles that others made, of every release: they stay verifiable.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use omsign_tests::world::{World, text};

fn data(name: &str) -> String {
    text(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/historical").join(name))
}

/// The model of a stored bundle, and how it is verified.
fn case(world: &World, release: &str, method: &str) -> anyhow::Result<Vec<String>> {
    let single = method == "elliptic-key" && release < "1.0.1";
    let newline = if method == "elliptic-key" { "\n" } else { "" };
    let model = format!("{release}-{method}");
    world.write(&format!("{model}/signme-1"), format!("signme-1{newline}"))?;
    if !single {
        world.write(&format!("{model}/signme-2"), "signme-2")?;
    }
    let model = if single { format!("{model}/signme-1") } else { model };
    let (certificates, key) = (data("ca.pem"), data("key.pub.pem"));
    let trust: &[&str] = match method {
        "certificate" => &["--certificate-chain", &certificates],
        "elliptic-key" => &["--public-key", &key],
        _ => &[
            "--identity",
            "stefanb@us.ibm.com",
            "--identity-provider",
            "https://sigstore.verify.ibm.com/oauth2",
        ],
    };
    let bundle = data(&format!("{release}-{method}.sig"));
    let arguments = [&["verify", &model, "--signature", &bundle], trust].concat();
    Ok(arguments.into_iter().map(str::to_owned).collect())
}

#[test]
fn every_release_and_method() -> anyhow::Result<()> {
    let world = World::new()?;
    let mut cases = 0;
    for release in ["0.3.1", "1.0.0", "1.0.1", "1.1.0"] {
        for method in ["certificate", "elliptic-key", "sigstore"] {
            let arguments = case(&world, release, method)?;
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let what = || format!("{release} {method}");
            world.omsign_ok(&arguments).with_context(what)?;
            world.omsign_ok(&["inspect", arguments[3]]).with_context(what)?;
            // With the method named, as the reference has it.
            let name = if method == "elliptic-key" { "key" } else { method };
            world.omsign_ok(&[&["verify", name], &arguments[1..]].concat()).with_context(what)?;
            // And not when the model is another one.
            let file = if world.path(arguments[1]).is_file() {
                arguments[1].to_owned()
            } else {
                format!("{}/signme-1", arguments[1])
            };
            fs::write(world.path(&file), "signme-x")?;
            world.omsign_refuses(1, &arguments, &["1 changed"]).with_context(what)?;
            cases += 1;
        }
    }
    ensure!(cases == 12);
    Ok(())
}

/// The Go tool, before and after June 2026, with its bundle beside the model, elsewhere and inside.
#[test]
fn bundles_of_the_go_tool() -> anyhow::Result<()> {
    let world = World::new()?;
    let data = |name: &str| text(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/go").join(name));
    world.write("m/config.json", "{}")?;
    world.write("m/sub/w.bin", "weights")?;
    let key = data("key.pub.pem");
    for bundle in ["beside.sig", "up.sig", "absolute.sig", "inside.sig", "newer.sig"] {
        let bundle = data(bundle);
        world.omsign_ok(&["verify", "m", "--signature", &bundle, "--public-key", &key])?;
        fs::copy(&bundle, world.path("m/model.sig"))?;
        let inside = ["verify", "m", "--signature", "m/model.sig", "--public-key", &key];
        world.omsign_ok(&inside)?;
        world.write("m/sub/more", "")?;
        world.omsign_refuses(1, &inside, &["1 not signed\n", "  not signed: sub/more\n"])?;
        fs::remove_file(world.path("m/sub/more"))?;
        fs::remove_file(world.path("m/model.sig"))?;
    }
    Ok(())
}

/// What release 0.2.0 signed is ambiguous, so only those who ask for it get it, and it is said.
#[test]
fn release_0_2_0_only_on_demand() -> anyhow::Result<()> {
    let world = World::new()?;
    let arguments = case(&world, "0.2.0", "certificate")?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    world.omsign_refuses(
        1,
        &arguments,
        &[
            "release 0.2.0 of model-signing, which signed an ambiguous encoding (OMS 11)",
            "hint: --allow-legacy",
        ],
    )?;
    let allowed = [&arguments[..], &["--allow-legacy"]].concat();
    let output = world.omsign(&allowed)?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(String::from_utf8_lossy(&output.stderr).contains("warning: this is a bundle of release 0.2.0"));
    let json: serde_json::Value =
        serde_json::from_str(&world.omsign_ok(&[&allowed[..], &["--json"]].concat())?)?;
    ensure!(json["legacy"] == true && json["files"] == 2, "{json}");
    let shown = world.omsign_ok(&["inspect", arguments[3]])?;
    ensure!(shown.contains("  signme-2\n") && shown.contains("of release 0.2.0"), "{shown}");
    // The same bundle is refused where anything is changed.
    let original = fs::read_to_string(arguments[3])?;
    world.write(
        "changed.sig",
        original.replace("\"sig\":\"M", "\"sig\":\"N").replace("\"sig\": \"M", "\"sig\": \"N"),
    )?;
    let changed: Vec<&str> = allowed
        .iter()
        .map(|argument| if *argument == arguments[3] { "changed.sig" } else { argument })
        .collect();
    world.omsign_refuses(1, &changed, &["the signature is not valid for this payload and key (OMS 8.2)"])?;
    fs::remove_file(world.path("0.2.0-certificate/signme-2"))?;
    world.omsign_refuses(1, &allowed, &["1 missing"])
}
