//! Tests of URLs, options and places.

use object_store::ClientConfigKey;

use super::*;

fn spec_with(url: &str, options: &[(&str, &str)]) -> Result<ReplicaSpec, TargetError> {
    let options = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    ReplicaSpec::parse("r".parse().unwrap(), url, options, FsPath::new("/home/me"))
}

fn spec(url: &str) -> ReplicaSpec {
    spec_with(url, &[]).unwrap()
}

fn bad(url: &str, options: &[(&str, &str)]) -> String {
    spec_with(url, options).unwrap_err().to_string()
}

#[test]
fn urls_have_one_normal_form() {
    for (given, normal) in [
        ("/a/b/", "file:///a/b"),
        ("b/../c", "file:///home/me/c"),
        ("file:///a%20b", "file:///a b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/p/q/", "s3://bucket/p/q"),
        ("gs://bucket/p", "gs://bucket/p"),
        ("az://container/p", "az://container/p"),
    ] {
        assert_eq!(spec(given).url, normal, "{given}");
    }
}

#[test]
fn bad_urls_say_what_would_be_right() {
    for (url, part) in [
        ("", "s3://bucket"),
        ("s4://bucket", "did you mean s3"),
        ("s3://", "names no bucket"),
        ("s3://key:secret@bucket/p", "do not belong in the URL"),
        ("s3://bucket/p?x=secret", "apart from the URL"),
        ("s3://host:9000/b", "endpoint"),
        ("s3://bucket/a//b", "empty path segment"),
        ("file://host/path", "file:///absolute"),
    ] {
        let text = bad(url, &[]);
        assert!(text.contains(part), "{url}: {text}");
        assert!(!text.contains("secret"), "{text}");
    }
}

#[test]
fn options_are_checked_by_name_and_value() {
    let text = bad("s3://b", &[("acces_key_id", "x")]);
    assert!(text.contains("did you mean \"access_key_id\""), "{text}");
    let text = bad("/a", &[("endpoint", "https://x")]);
    assert!(text.contains("for file"), "{text}");
    for (url, option, value, part) in [
        ("s3://b", "allow_http", "maybe", "neither true nor false"),
        ("s3://b", "endpoint", "http://localhost:1", "allow_http"),
        ("s3://b", "endpoint", "localhost", "endpoint"),
        ("s3://b", "conditional_put", "no", "etag, disabled"),
        ("/a", "timeout", "1h", "between"),
        ("/a", "in_flight", "0", "1 to 64"),
        ("/a", "reads_in_flight", "257", "1 to 256"),
        ("/a", "upload_limit", "12:00,slow", "option upload_limit: \"slow\" is not a rate"),
        ("s3://b", "download_limit", "25:00,1M", "option download_limit: \"25:00\" is no time"),
    ] {
        let text = bad(url, &[(option, value)]);
        assert!(text.contains(part), "{text}");
    }
    let good = spec_with("/a", &[("timeout", "2s"), ("in_flight", "9")]).unwrap();
    assert_eq!((good.limits.call, good.limits.in_flight), (Duration::from_secs(2), 9));
    let secret = spec_with("s3://b", &[("secret_access_key", "hush")]).unwrap();
    assert!(!format!("{secret:?}").contains("hush"));
}

#[test]
fn every_known_option_reaches_a_client() {
    let all: &[(&str, &[(&str, &str)])] = &[
        (
            "s3://b/p",
            &[
                ("endpoint", "http://127.0.0.1:9"),
                ("region", "eu"),
                ("access_key_id", "a"),
                ("secret_access_key", "s"),
                ("session_token", "t"),
                ("allow_http", "true"),
                ("virtual_hosted_style", "false"),
                ("conditional_put", "disabled"),
                ("checksum", "crc64nvme"),
                ("anonymous", "false"),
            ],
        ),
        ("gs://b/p", &[("base_url", "http://127.0.0.1:9"), ("bearer_token", "t"), ("allow_http", "true")]),
        (
            "az://b/p",
            &[
                ("account", "a"),
                ("account_key", "aGVsbG8="),
                ("endpoint", "http://127.0.0.1:9"),
                ("allow_http", "true"),
            ],
        ),
        ("az://b/p", &[("emulator", "true")]),
    ];
    for (url, options) in all {
        let store = spec_with(url, options).unwrap().store().unwrap();
        assert_eq!(store.url(), *url);
    }
    let spec = spec_with("s3://b/p", all[0].1).unwrap();
    assert!(!spec.store().unwrap().is_conditional());
    let built = spec.s3();
    let value = |key| built.get_config_value(&key).unwrap();
    assert_eq!(value(AmazonS3ConfigKey::Endpoint), "http://127.0.0.1:9");
    assert_eq!(value(AmazonS3ConfigKey::Token), "t");
    assert_eq!(value(AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp)), "true");
}

#[test]
fn names_come_from_the_argument_or_the_place() {
    let cwd = FsPath::new("/");
    let name =
        |arg: &str, taken: &[ReplicaName]| ReplicaSpec::parse_arg(arg, taken, cwd).unwrap().name.to_string();
    assert_eq!(name("eu=s3://b/p", &[]), "eu");
    assert_eq!(name("s3://b/p", &[]), "p");
    assert_eq!(name("/x/ä b", &[]), "--b");
    assert_eq!(name("/x/a=b", &[]), "a-b");
    assert_eq!(name("/", &[]), "replica");
    assert_eq!(name("/x/p", &["p".parse().unwrap(), "p-2".parse().unwrap()]), "p-3");
    assert!(ReplicaSpec::parse_arg("a b=/x", &[], cwd).is_err());
}

#[test]
fn same_places_are_found_through_symlinks_and_nesting() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real");
    std::fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, dir.path().join("link")).unwrap();
    let at = |p: &str| spec(dir.path().join(p).to_str().unwrap());
    assert!(same_place(&at("real"), &at("link")).is_some());
    assert!(same_place(&at("real/not/yet"), &at("link/not/yet")).is_some());
    assert!(same_place(&at("real"), &at("link/inner")).is_some());
    assert!(same_place(&at("real"), &at("real2")).is_none());

    let same = |a: &str, b: &str| same_place(&spec(a), &spec(b)).is_some();
    assert!(same("s3://b/p", "s3://b/p/"));
    assert!(same("s3://b", "s3://b/p"));
    assert!(same("s3://b/p/q", "s3://b/p"));
    assert!(!same("s3://b/p", "s3://b/pq"));
    assert!(!same("s3://b/p", "s3://c/p"));
    assert!(!same("s3://b/p", "gs://b/p"));
    let at = |e: &str| spec_with("s3://b/p", &[("endpoint", e)]).unwrap();
    assert!(same_place(&at("https://one"), &at("https://two")).is_none());
    assert!(same_place(&at("https://one"), &at("https://ONE/")).is_some());

    let (mut a, mut b) = (spec("/a"), spec("/b"));
    assert!(matches!(check_distinct(&[a.clone(), b.clone()]), Err(TargetError::SameName { .. })));
    b.name = "s".parse().unwrap();
    assert_eq!(check_distinct(&[a.clone(), b.clone()]), Ok(()));
    a = spec("/b/inner");
    assert!(matches!(check_distinct(&[a, b]), Err(TargetError::SamePlace { .. })));
}
