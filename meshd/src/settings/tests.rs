use super::*;

fn flags(text: &str) -> RunFlags {
    let (flags, mistakes) = parse_file(text);
    assert_eq!(mistakes, [""; 0]);
    flags
}

fn check(text: &str) -> Result<Settings, SettingsError> {
    Settings::check(flags(text), Vec::new())
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let settings = check("node = 'a'").unwrap();
    assert_eq!(settings.etcd.endpoints[0], "http://127.0.0.1:2379");
    assert_eq!(settings.etcd.prefix, "/meshd");
    assert_eq!(settings.listen_port, 51820);
    assert_eq!(settings.interface.as_str(), "meshd0");
    assert_eq!(settings.state_dir, Path::new("/var/lib/meshd"));
    assert_eq!(settings.run_dir, Path::new("/run/meshd"));
    assert_eq!(settings.endpoint, EndpointSetting::Derived);
    assert!(settings.ip_masq && !settings.forward_accept);
    assert_eq!(settings.offloads, OffloadSettings::default());
}

#[test]
fn the_page_is_served_where_it_is_asked_for_and_on_loopback_only() {
    let ui = |text: &str| check(&format!("node = 'a'\nui-addr = '{text}'")).map(|settings| settings.ui);
    assert_eq!(check("node = 'a'").unwrap().ui, None);
    assert_eq!(ui("none").unwrap(), None);
    for address in ["127.0.0.1:9474", "[::1]:9474"] {
        assert_eq!(ui(address).unwrap(), Some(address.parse().unwrap()));
    }
    for wrong in ["0.0.0.0:9474", "[::]:9474", "10.0.0.1:9474", "127.0.0.1:0", "127.0.0.1", "9474", "localhost:9474"] {
        let error = ui(wrong).unwrap_err().to_string();
        assert!(error.starts_with(&format!("--ui-addr {wrong}: not ")) && error.lines().count() == 1, "{error}");
    }
}

#[test]
fn each_offload_has_its_switch() {
    use tunnel::OffloadSetting::{Auto, Off};
    let settings = check("node = 'a'\nudp-gso = 'off'\ntun-offload = 'auto'").unwrap();
    assert_eq!(settings.offloads, OffloadSettings { udp_gso: Off, udp_gro: Auto, tun_offload: Auto });
    let (_, mistakes) = parse_file("node = 'a'\nudp-gro = 'on'");
    assert!(mistakes[0].starts_with("udp-gro: unknown variant"), "{mistakes:?}");
}

#[test]
fn marks_of_an_earlier_version_are_accepted_with_a_warning() {
    assert!(check("node = 'a'").unwrap().obsolete.is_empty());
    for given in ["'0x7f0000', '0x7f000000'", "'anything'"] {
        let settings = check(&format!("node = 'a'\npolicy-marks = [{given}]")).unwrap();
        assert!(settings.obsolete[0].starts_with("--policy-marks is ignored"), "{:?}", settings.obsolete);
        assert_eq!(settings.try_out().warnings, settings.obsolete);
    }
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let error = check(
        "node = 'a'\netcd-endpoints = ['http://10.0.0.1:2379', 'nonsense']\nlisten-port = 65535\nendpoint = 'x'\n\
         public-ip = ['127.0.0.1']\nlog-level = 'loud'\netcd-username = 'u'\netcd-prefix = '/'",
    )
    .unwrap_err()
    .to_string();
    for part in [
        "is plain http to another machine",
        "nonsense\": must be HOST:PORT",
        "--listen-port 65535",
        "--endpoint x",
        "--public-ip 127.0.0.1",
        "--log-level loud",
        "--etcd-username: needs",
        "etcd prefix \"/\"",
    ] {
        assert!(error.contains(part), "{part} in:\n{error}");
    }
}

#[test]
fn a_flag_comes_before_the_file() {
    let merged = flags("node = 'flag'").over(flags("node = 'file'\nsite = 'east'"));
    assert_eq!((merged.node.as_deref(), merged.site.as_deref()), (Some("flag"), Some("east")));
}

#[test]
fn plaintext_beyond_loopback_needs_its_flag() {
    let text = "node = 'a'\netcd-endpoints = ['http://10.0.0.1:2379']\n";
    assert!(check(text).is_err());
    assert!(check(&format!("{text}etcd-allow-plaintext = true")).is_ok());
}

#[test]
fn a_key_that_is_no_flag_is_refused() {
    for text in ["nod = 'a'", "etcd_prefix = '/x'", "config = 'other.toml'", "check = true"] {
        let (_, mistakes) = parse_file(text);
        assert!(matches!(&mistakes[..], [mistake] if mistake.contains("unknown setting")), "{mistakes:?}");
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn mistakes_of_the_file_and_of_the_flags_are_reported_together() {
    let file = file(
        "nod = 'a'\nsit = 'b'\nlisten-port = 'many'\nlog-format = 'xml'\netcd-prefix = 7\nsite = 'Not A Site'\ncluster = 'Not A Cluster'\n\
         forward-accept = 'yes'\npublic-ip = ['192.0.2.1', 'here']\n",
    );
    let given = RunFlags {
        config: Some(file.path().to_owned()),
        node: Some("a".to_owned()),
        endpoint: Some("x".to_owned()),
        log_level: Some("loud".to_owned()),
        ..RunFlags::default()
    };
    let error = Settings::load(given).unwrap_err().to_string();
    for part in [
        "nod: unknown setting",
        "sit: unknown setting",
        "listen-port: invalid type",
        "log-format: unknown variant `xml`",
        "etcd-prefix: invalid type",
        "forward-accept: invalid type",
        "public-ip: invalid IP address",
        "--site Not A Site",
        "--cluster Not A Cluster",
        "--endpoint x",
        "--log-level loud",
    ] {
        assert!(error.contains(part), "{part} in:\n{error}");
    }
    assert_eq!(error.lines().count(), 11, "{error}");
}

#[test]
fn a_file_that_cannot_be_read_hides_no_mistake_of_the_flags() {
    let nonsense = file("node = \n");
    for path in [nonsense.path(), Path::new("/nonexistent/meshd.toml")] {
        let given = RunFlags { config: Some(path.to_owned()), endpoint: Some("x".to_owned()), ..RunFlags::default() };
        let error = Settings::load(given).unwrap_err().to_string();
        assert!(error.contains(&format!("--config {}: ", path.display())), "{error}");
        assert!(error.contains("--endpoint x"), "{error}");
    }
}

#[test]
fn what_can_be_read_of_a_file_with_mistakes_counts() {
    let (flags, mistakes) = parse_file("node = 'a'\nlisten-port = 'x'\netcd-endpoints = ['http://127.0.0.1:1']\n");
    assert_eq!(mistakes.len(), 1, "{mistakes:?}");
    assert_eq!(flags.node.as_deref(), Some("a"));
    assert_eq!(flags.etcd.endpoints.unwrap(), ["http://127.0.0.1:1"]);
}

#[test]
fn a_cleanup_takes_its_places_from_the_file_and_judges_nothing_else_in_it() {
    let text = "node = 'Not A Node'\netcd-password-file = '/nonexistent'\nstate-dir = '/s'\ninterface = 'tun7'\n";
    let with_node = file(text);
    let given = CleanupFlags {
        config: Some(with_node.path().to_owned()),
        run_dir: Some("/r".into()),
        ..CleanupFlags::default()
    };
    let settings = CleanupSettings::load(&given).unwrap();
    assert_eq!(settings.interface.as_str(), "tun7");
    assert_eq!((settings.state_dir.as_path(), settings.run_dir.as_path()), (Path::new("/s"), Path::new("/r")));
}

#[test]
fn mistakes_in_the_file_do_not_keep_anybody_from_cleaning_up() {
    let wrong = file("interfce = 'tun7'\ninterface = 'no/name'\nlog-level = 'loud'\nstate-dir = '/s'\n");
    let given = CleanupFlags { config: Some(wrong.path().to_owned()), ..CleanupFlags::default() };
    let settings = CleanupSettings::load(&given).unwrap();
    assert_eq!((settings.interface.as_str(), settings.state_dir.as_path()), ("meshd0", Path::new("/s")));
    assert_eq!(settings.mistakes.len(), 3, "{:?}", settings.mistakes);
    assert!(settings.mistakes[0].contains("interfce: unknown setting"), "{:?}", settings.mistakes);
    // Those of the command line are of this very moment.
    let given = CleanupFlags { interface: Some("no/name".to_owned()), ..CleanupFlags::default() };
    assert!(CleanupSettings::load(&given).unwrap_err().to_string().starts_with("--interface no/name"));
}

#[test]
fn an_operators_command_reaches_etcd_as_the_file_says_and_not_as_the_node() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("meshd.toml");
    let password = folder.path().join("password");
    fs::write(&password, "word\n").unwrap();
    let load = |text: &str, flags: EtcdFlags| {
        let text = text.replace("PASSWORD", &password.display().to_string());
        fs::write(&file, text).unwrap();
        load_etcd(flags, Some(file.clone()))
    };
    let text = "node = 'a'\nlisten-port = 'no port'\netcd-endpoints = ['https://e:2379']\netcd-prefix = '/other'\n\
                etcd-username = 'node'\netcd-password-file = 'PASSWORD'\n";
    let options = load(text, EtcdFlags::default()).unwrap();
    assert_eq!((options.endpoints[0].as_str(), options.prefix.as_str()), ("https://e:2379", "/other"));
    assert_eq!(options.user.map(|user| user.user), Some("node".to_owned()));
    let flags = EtcdFlags {
        username: Some("operator".to_owned()),
        password_file: Some(password.clone()),
        ..EtcdFlags::default()
    };
    let options = load(text, flags).unwrap();
    assert_eq!((options.prefix.as_str(), options.user.map(|user| user.user)), ("/other", Some("operator".to_owned())));
    let flags = EtcdFlags { prefix: Some("/flag".to_owned()), ..EtcdFlags::default() };
    assert_eq!(load(text, flags).unwrap().prefix, "/flag", "flags win");

    let error = load("etcd-endpoint = ['https://e:2379']\n", EtcdFlags::default()).unwrap_err().to_string();
    assert!(error.contains("etcd-endpoint: unknown setting"), "{error}");
    let missing = Some(folder.path().join("nope.toml"));
    let error = load_etcd(EtcdFlags::default(), missing.clone()).unwrap_err().to_string();
    assert!(error.contains("nope.toml: No such file"), "{error}");
    let flags = EtcdFlags { endpoints: Some(vec!["https://e:2379".to_owned()]), ..EtcdFlags::default() };
    assert!(load_etcd(flags, missing).is_ok(), "the flags name etcd");
}

#[test]
fn the_members_come_from_one_place() {
    let folder = tempfile::tempdir().unwrap();
    let (file, members) = (folder.path().join("meshd.toml"), folder.path().join("endpoints"));
    fs::write(&members, "https://e:2379\nhttps://f:2379\n").unwrap();
    fs::write(&file, format!("node = 'a'\netcd-endpoints-file = '{}'\n", members.display())).unwrap();
    let options = load_etcd(EtcdFlags::default(), Some(file.clone())).unwrap();
    assert_eq!(options.endpoints, ["https://e:2379", "https://f:2379"]);
    let flags = EtcdFlags { endpoints: Some(vec!["https://g:1".to_owned()]), ..EtcdFlags::default() };
    assert_eq!(load_etcd(flags.clone(), Some(file.clone())).unwrap().endpoints, ["https://g:1"], "flags win");
    let both = EtcdFlags { endpoints_file: Some(members.clone()), ..flags };
    let error = load_etcd(both, Some(file.clone())).unwrap_err().to_string();
    assert!(error.contains("--etcd-endpoints-file: give one of them"), "{error}");
    fs::remove_file(&members).unwrap();
    let error = load_etcd(EtcdFlags::default(), Some(file)).unwrap_err().to_string();
    assert!(error.contains("--etcd-endpoints-file") && error.contains("No such file"), "{error}");
}

#[test]
fn a_switch_takes_a_value_and_counts_before_the_file() {
    use clap::Parser as _;
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        run: RunFlags,
    }
    let given = |switches: &[&str]| {
        let line = ["meshd", "--node", "a"].iter().chain(switches);
        Line::try_parse_from(line).map(|line| line.run)
    };
    for (switch, wanted) in
        [("", None), ("=true", Some(true)), ("=yes", Some(true)), ("=false", Some(false)), ("=0", Some(false))]
    {
        let of = |name: &str| if wanted.is_none() { format!("--{name}") } else { format!("--{name}{switch}") };
        let switches = ["metrics-per-peer", "forward-accept", "no-ip-masq", "etcd-allow-plaintext"].map(of);
        let run = given(&switches.each_ref().map(String::as_str)).unwrap_or_else(|error| panic!("{error}"));
        let values = [run.metrics_per_peer, run.forward_accept, run.no_ip_masq, run.etcd.allow_plaintext];
        assert_eq!(values, [wanted.or(Some(true)); 4], "{switch}");
    }
    assert!(given(&["--metrics-per-peer=perhaps"]).is_err());
    let file = flags("metrics-per-peer = true\nforward-accept = true");
    let run = given(&["--metrics-per-peer=false"]).unwrap_or_else(|error| panic!("{error}")).over(file);
    assert_eq!((run.metrics_per_peer, run.forward_accept), (Some(false), Some(true)));
}
