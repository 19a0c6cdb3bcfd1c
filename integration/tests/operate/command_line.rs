//! What a stranger to the tools meets: settings that do not hold, a socket that is not for them, `--help`.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixListener, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use integration::binary;
use serde_json::Value;

/// The user `nobody`.
const NOBODY: u32 = 65534;

/// Exit code, standard output, standard error.
type Said = (Option<i32>, String, String);

fn run(command: &mut Command) -> Said {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn tool(name: &str, args: &[&str]) -> Said {
    run(Command::new(binary(name)).args(args).env_remove("MESHD_CONFIG"))
}

/// As a user without rights, who may not even enter the folder that the tools were built in.
fn as_nobody(folder: &Path, name: &str, args: &[&str]) -> Said {
    let copy: PathBuf = folder.join(name);
    // By another process: a file that is open for writing here, or in a child that another test begins now, cannot be
    // run.
    assert!(Command::new("cp").arg(binary(name)).arg(&copy).status().unwrap().success());
    run(Command::new(copy).args(args).uid(NOBODY).gid(NOBODY).current_dir("/"))
}

fn open_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

#[test]
fn a_socket_that_is_not_for_this_user_is_told_with_the_remedy() {
    let folder = open_folder();
    let socket = folder.path().join("meshd.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o660)).unwrap();
    let run_dir = folder.path().to_str().unwrap();
    let (code, _, said) = as_nobody(folder.path(), "meshctl", &["--run-dir", run_dir, "status"]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("permission denied on ") && said.contains("usermod -aG meshd"), "{said}");
    let nowhere = folder.path().join("nowhere");
    let (code, _, said) = tool("meshctl", &["--run-dir", nowhere.to_str().unwrap(), "status"]);
    assert!(code == Some(3) && said.contains("is `meshd run` up"), "{said}");
    assert_eq!(said.matches("os error 2").count(), 1, "{said}");
    let offline = ["policy", "explain", "a/b", "c/d", "tcp/1", "--offline", nowhere.to_str().unwrap()];
    let (code, _, said) = tool("meshctl", &offline);
    assert!(code == Some(1) && said.matches("os error 2").count() == 1, "{said}");
}

#[test]
fn a_daemon_without_rights_says_which_and_how_to_have_them() {
    let folder = open_folder();
    let path = folder.path().to_str().unwrap();
    for command in ["run", "floor", "cleanup"] {
        let mut args = vec![command, "--state-dir", path, "--run-dir", path];
        if command == "run" {
            args.extend(["--node", "a"]);
        }
        let (code, _, said) = as_nobody(folder.path(), "meshd", &args);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("CAP_NET_ADMIN") && said.contains(&format!("sudo meshd {command}")), "{said}");
    }
}

#[test]
fn a_start_with_plain_http_to_another_machine_is_refused() {
    let (code, _, said) = tool("meshd", &["run", "--node", "a", "--etcd-endpoints", "http://192.0.2.1:2379"]);
    assert!(code == Some(2) && said.contains("--etcd-allow-plaintext"), "{said}");
}

#[test]
fn a_switch_as_a_variable_takes_the_usual_words() {
    let with = |name: &str, value: &str| {
        run(Command::new(binary("meshd")).args(["run", "--check", "--node", "a"]).env(name, value))
    };
    for name in ["MESHD_FORWARD_ACCEPT", "MESHD_NO_IP_MASQ", "MESHD_METRICS_PER_PEER", "MESHD_ETCD_ALLOW_PLAINTEXT"] {
        for value in ["1", "yes", "on", "true", "0", "no", "off", "false"] {
            let (code, _, said) = with(name, value);
            assert_eq!(code, Some(0), "{name}={value}: {said}");
        }
        assert_eq!(with(name, "perhaps").0, Some(2), "{name}");
    }
    // And they mean what they say.
    let plain = |value: &str| {
        let args = ["run", "--check", "--node", "a", "--etcd-endpoints", "http://192.0.2.1:2379"];
        run(Command::new(binary("meshd")).args(args).env("MESHD_ETCD_ALLOW_PLAINTEXT", value)).0
    };
    assert_eq!((plain("yes"), plain("no")), (Some(0), Some(2)));
}

#[test]
fn a_check_of_the_settings_opens_the_files_that_they_name() {
    let folder = open_folder();
    let file = folder.path().join("ca.pem");
    let check = |file: &Path| {
        let endpoints = "https://etcd-1:2379";
        tool(
            "meshd",
            &["run", "--check", "--node", "a", "--etcd-endpoints", endpoints, "--etcd-cafile", file.to_str().unwrap()],
        )
    };
    fs::write(&file, "no certificate").unwrap();
    let (code, _, said) = check(&file);
    assert!(code == Some(2) && said.contains(&format!("--etcd-cafile {}: ", file.display())), "{said}");
    let (code, _, said) = tool("meshd", &["run", "--check", "--node", "a", "--iface", "nope0"]);
    assert!(code == Some(0) && said.contains("warning: --iface nope0"), "{said}");
}

#[test]
fn a_value_is_judged_for_programs_too() {
    let folder = open_folder();
    let file = folder.path().join("config.json");
    let check = |value: &str, output: &str| {
        fs::write(&file, value).unwrap();
        tool("meshctl", &["-o", output, "check", "config", file.to_str().unwrap()])
    };
    let misspelt = r#"{"Network": "10.244.0.0/16", "LeesTTL": 60, "Backend": {"Type": "vxlan", "PSK": "x"}}"#;
    let (code, _, said) = check(misspelt, "table");
    assert!(code == Some(0) && said.contains("warning: unknown field \"LeesTTL\""), "{said}");
    assert!(said.contains("did you mean LeaseTTL?"), "{said}");
    assert!(said.contains("warning: Flannel's Backend.PSK has no meaning here"), "{said}");
    let (code, _, said) = check(r#"{"Network": "10.244.0.0/16", "Backend": {"DirectRoutin": false}}"#, "table");
    assert!(code == Some(1) && said.contains("did you mean DirectRouting?"), "{said}");
    let json = |(code, out, _): Said| (code, serde_json::from_str::<Value>(&out).unwrap());
    let (code, told) = json(check(misspelt, "json"));
    assert_eq!((code, &told["unknown"][0]["path"]), (Some(0), &"LeesTTL".into()), "{told}");
    let (code, told) = json(check(r#"{"Network": "nonsense"}"#, "json"));
    assert_eq!((code, &told["holds"]), (Some(1), &false.into()), "{told}");
    assert!(told["error"].as_str().unwrap().contains("nonsense"), "{told}");
}

#[test]
fn help_is_found_where_it_is_looked_for() {
    for (name, args, words) in [
        ("meshd", &["help", "run"][..], "--etcd-endpoints"),
        ("meshctl", &["help", "ping"], "--size"),
        ("meshd-cni", &["--help"], "meshd install-cni"),
        ("meshd-cni", &["--version"], "meshd-cni "),
    ] {
        let (code, told, _) = tool(name, args);
        assert!(code == Some(0) && told.contains(words), "{name} {args:?}: {told}");
    }
    let (code, _, said) = tool("meshd", &["install-cni", "--chain", "/nope", "--bin-dir", "/nonexistent/bin"]);
    assert!(code == Some(1) && said.contains("/nope: no such conflist"), "{said}");
}
