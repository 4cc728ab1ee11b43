//! What is wrong with certificates and keys, in a sentence for each; made with openssl, as everybody makes them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use coney::testing::RabbitMq;
use coney::{App, ConnectError, Error};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SanType, date_time_ymd};
use tempfile::TempDir;

use crate::support::{app, queue};

/// A directory, and openssl in it.
struct Workshop(TempDir);

impl Workshop {
    fn new() -> Workshop {
        Workshop(TempDir::new().unwrap())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `openssl` with these words, which contain no spaces of their own.
    #[track_caller]
    fn openssl(&self, words: &str) {
        let output = Command::new("openssl").args(words.split(' ')).current_dir(self.0.path()).output();
        let output = output.expect("openssl, which scripts/test installs");
        assert!(output.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A certificate that signs itself, `NAME.pem`, with its key `NAME.key`.
    #[track_caller]
    fn self_signed(&self, name: &str, more: &str) {
        self.openssl(&format!(
            "req -x509 -nodes -days 30 -subj /CN=localhost -keyout {name}.key -out {name}.pem {more}"
        ));
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.file(name), content).unwrap();
        self.file(name)
    }
}

const RSA: &str = "-newkey rsa:2048";
const NAMES: &str = "-addext subjectAltName=DNS:localhost,IP:127.0.0.1";

fn with_tls(port: u16, settings: &[(&str, &Path)]) -> App {
    let lines: Vec<String> =
        settings.iter().map(|(key, path)| format!("{key} = {:?}", path.display().to_string())).collect();
    app(
        &format!("amqps://127.0.0.1:{port}"),
        &format!("connect_timeout = \"20s\"\n[broker.tls]\n{}\n", lines.join("\n")),
    )
}

/// Why TLS does not come about.
#[track_caller]
fn refused(port: u16, settings: &[(&str, &Path)]) -> String {
    match with_tls(port, settings).publish_pool().connection().unwrap_err() {
        error @ Error::Connect { cause: ConnectError::Tls(_), .. } => {
            let text = error.to_string();
            for riddle in ["Other(", "OtherError", "invalid peer certificate", "General("] {
                assert!(!text.contains(riddle), "{text}");
            }
            text
        }
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn says(why: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| why.contains(part)), "{why}\nexpected {parts:?}");
}

/// A TLS server that is `openssl s_server`, so that it may have a certificate that others would not.
struct Server {
    program: Child,
    port: u16,
}

impl Server {
    fn start(workshop: &Workshop, certificate: &str, key: &str) -> Server {
        let words = format!(
            "s_server -accept 127.0.0.1:0 -cert {certificate} -key {key} -cipher DEFAULT@SECLEVEL=0 -naccept 1 -no_ticket"
        );
        let mut program = Command::new("openssl")
            .args(words.split(' '))
            .current_dir(workshop.0.path())
            // It ends when it can read nothing.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl, which scripts/test installs");
        let mut lines = BufReader::new(program.stdout.take().unwrap()).lines();
        let port = lines
            .find_map(|line| line.unwrap().strip_prefix("ACCEPT 127.0.0.1:").and_then(|port| port.trim().parse().ok()))
            .expect("a port");
        // What else it says is read, so that it is not held up.
        std::thread::spawn(move || lines.for_each(drop));
        Server { program, port }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

#[test]
fn a_file_that_is_no_pem_or_holds_something_else_is_named_with_what_it_is() {
    let workshop = Workshop::new();
    workshop.self_signed("own", &format!("{RSA} {NAMES}"));
    workshop.openssl("x509 -in own.pem -outform der -out own.der");
    workshop.openssl("pkey -in own.key -outform der -out own.key.der");
    workshop.openssl("pkcs12 -export -in own.pem -inkey own.key -passout pass: -out own.p12");
    workshop.openssl("crl2pkcs7 -nocrl -certfile own.pem -out own.p7b");
    workshop.openssl("crl2pkcs7 -nocrl -certfile own.pem -outform der -out own.p7b.der");
    workshop.openssl("pkey -in own.key -aes256 -passout pass:secret -out encrypted.key");
    workshop.openssl("rsa -in own.key -traditional -aes256 -passout pass:secret -out traditional.key");
    workshop.openssl("pkey -in own.key -pubout -out public.key");
    workshop.openssl("genpkey -algorithm ed448 -out ed448.key");
    workshop.openssl("genrsa -out small.key 1024");
    workshop.write("empty", "");
    workshop.write("blank", " \n\n");
    workshop.write("prose", "certificate, please");
    let pem = fs::read_to_string(workshop.file("own.pem")).unwrap();
    workshop.write("cut", &pem[..pem.len() / 2]);
    workshop.write(
        "wide",
        pem.encode_utf16().fold(vec![0xff, 0xfe], |bytes, unit| [bytes, unit.to_le_bytes().to_vec()].concat()),
    );
    workshop.write("indented", pem.lines().map(|line| format!("    {line}\n")).collect::<String>());
    let marked = [b"\xef\xbb\xbf".as_slice(), pem.replace('\n', "\r\n").as_bytes()].concat();
    workshop.write("marked", marked);
    workshop.write("damaged", "-----BEGIN CERTIFICATE-----\nMIIBAAAA\n-----END CERTIFICATE-----\n");
    workshop.write("junk", "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n");

    // Nobody is asked: what is wrong is our own.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let own = workshop.file("own.pem");
    for (file, parts) in [
        ("empty", &["it is empty", "expected certificates in PEM"][..]),
        ("blank", &["it is empty"]),
        ("prose", &["it is not in PEM"]),
        ("own.der", &["it is in DER", "openssl x509 -inform der"]),
        ("own.p12", &["it is in PKCS#12", "openssl pkcs12"]),
        ("own.p7b.der", &["it is in PKCS#7", "openssl pkcs7 -inform der"]),
        ("own.p7b", &["it has PKCS7", "openssl pkcs7"]),
        ("own.key", &["it has PRIVATE KEY", "BEGIN CERTIFICATE"]),
        ("wide", &["UTF-16"]),
        ("indented", &["no line begins with -----BEGIN"]),
        ("cut", &["it is damaged"]),
        ("junk", &["it is damaged"]),
        ("nowhere", &["No such file"]),
        (".", &["Is a directory"]),
    ] {
        let path = workshop.file(file);
        let name = path.display().to_string();
        says(&refused(port, &[("ca_file", &path)]), &[parts, &["ca_file", &name]].concat());
        let why =
            refused(port, &[("ca_file", &own), ("certificate_file", &path), ("key_file", &workshop.file("own.key"))]);
        says(&why, &[parts, &["certificate_file", &name]].concat());
    }
    // A byte order mark and the line ends of Windows do no harm: the file is accepted, and so the key is what is wrong.
    let marked = workshop.file("marked");
    let why =
        refused(port, &[("ca_file", &marked), ("certificate_file", &marked), ("key_file", &workshop.file("empty"))]);
    says(&why, &["key_file", "it is empty"]);
    says(&refused(port, &[("ca_file", &workshop.file("damaged"))]), &["ca_file", "damaged", "number 1"]);
    for (file, parts) in [
        ("empty", &["it is empty", "expected a private key"][..]),
        ("prose", &["it is not in PEM"]),
        ("own.key.der", &["it is in DER", "openssl pkey -inform der"]),
        ("own.p12", &["it is in PKCS#12", "openssl pkcs12"]),
        ("encrypted.key", &["encrypted", "openssl pkey -in"]),
        ("traditional.key", &["encrypted", "openssl pkey -in"]),
        ("own.pem", &["it has CERTIFICATE", "expected a private key"]),
        ("public.key", &["it has PUBLIC KEY"]),
        ("ed448.key", &["of a kind that cannot be used", "2048"]),
        ("small.key", &["of a kind that cannot be used", "2048"]),
        ("nowhere", &["No such file"]),
    ] {
        let path = workshop.file(file);
        let why = refused(port, &[("ca_file", &own), ("certificate_file", &own), ("key_file", &path)]);
        says(&why, &[parts, &["key_file", &path.display().to_string()]].concat());
    }
}

#[test]
fn a_certificate_and_a_key_that_do_not_fit_are_both_named() {
    let workshop = Workshop::new();
    workshop.self_signed("one", &format!("{RSA} {NAMES}"));
    workshop.self_signed("two", "-newkey ec -pkeyopt ec_paramgen_curve:P-256");
    workshop.openssl("req -new -key one.key -subj /CN=old -out old.csr");
    workshop.openssl("x509 -req -in old.csr -signkey one.key -days 30 -out old.pem");
    let [one, two] = ["one.pem", "two.pem"].map(|name| fs::read_to_string(workshop.file(name)).unwrap());
    workshop.write("wrong-order.pem", two + &one);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let _listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let why = |certificate: &str, key: &str| {
        let files = [certificate, key].map(|name| workshop.file(name));
        refused(
            port,
            &[("ca_file", &workshop.file("one.pem")), ("certificate_file", &files[0]), ("key_file", &files[1])],
        )
    };
    says(&why("one.pem", "two.key"), &["two.key", "is not the key of", "certificate_file", "one.pem"]);
    says(
        &why("wrong-order.pem", "one.key"),
        &["certificate_file", "wrong-order.pem", "one.key", "number 2", "the first"],
    );
    says(&why("old.pem", "one.key"), &["certificate_file", "old.pem", "version 1", "expected version 3"]);
    workshop.write("damaged.pem", "-----BEGIN CERTIFICATE-----\nMIIBAAAA\n-----END CERTIFICATE-----\n");
    says(&why("damaged.pem", "one.key"), &["certificate_file", "damaged.pem", "cannot be read"]);
}

#[test]
fn what_is_wrong_with_the_servers_certificate_is_said_in_a_sentence() {
    let workshop = Workshop::new();
    let authority = |name: &str, subject: &str| {
        workshop.openssl(&format!(
            "req -x509 {RSA} -nodes -days 30 -subj /CN={subject} -keyout {name}.key -out {name}.pem"
        ));
    };
    authority("authority", "authority");
    authority("namesake", "authority");
    authority("other", "other");
    workshop.self_signed("stranger", &format!("{RSA} {NAMES}"));
    workshop.self_signed("nameless", RSA);
    workshop.self_signed("elsewhere", &format!("{RSA} -addext subjectAltName=DNS:elsewhere.example"));
    // Of certificates that no authority has made: versions, digests, keys.
    workshop.openssl("req -new -key stranger.key -subj /CN=localhost -out server.csr");
    workshop.openssl("x509 -req -in server.csr -signkey stranger.key -days 30 -out version1.pem");
    workshop.write("server.ext", "subjectAltName = DNS:localhost, IP:127.0.0.1\n");
    workshop.write("client.ext", "subjectAltName = DNS:localhost, IP:127.0.0.1\nextendedKeyUsage = clientAuth\n");
    workshop.write("critical.ext", "subjectAltName = DNS:localhost, IP:127.0.0.1\n1.2.3.4 = critical, ASN1:NULL\n");
    let signed = |name: &str, csr: &str, more: &str| {
        workshop.openssl(&format!(
            "x509 -req -in {csr} -CA authority.pem -CAkey authority.key -set_serial 7 -out {name}.pem {more}"
        ));
    };
    signed("sha1", "server.csr", "-sha1 -days 30 -extfile server.ext");
    signed("md5", "server.csr", "-md5 -days 30 -extfile server.ext");
    signed("server", "server.csr", "-days 30 -extfile server.ext");
    signed("client", "server.csr", "-days 30 -extfile client.ext");
    signed("critical", "server.csr", "-days 30 -extfile critical.ext");
    workshop.openssl("genrsa -out small.key 1024");
    workshop.openssl("req -new -key small.key -subj /CN=localhost -out small.csr");
    signed("small", "small.csr", "-days 30 -extfile server.ext");

    let why = |certificate: &str, key: &str, ca: &str| {
        let server = Server::start(&workshop, &format!("{certificate}.pem"), &format!("{key}.key"));
        refused(server.port, &[("ca_file", &workshop.file(&format!("{ca}.pem")))])
    };
    says(&why("stranger", "stranger", "sha1"), &["certificate authority (CA:TRUE)", "ca_file"]);
    says(&why("nameless", "nameless", "nameless"), &["no subjectAltName", "127.0.0.1", "server_name"]);
    says(&why("elsewhere", "elsewhere", "elsewhere"), &["elsewhere.example", "127.0.0.1", "server_name"]);
    says(&why("version1", "stranger", "version1"), &["version 1", "expected version 3", "-extfile"]);
    says(&why("sha1", "stranger", "authority"), &["SHA-1", "SHA-256"]);
    says(&why("md5", "stranger", "authority"), &["MD5", "SHA-256"]);
    says(&why("client", "stranger", "authority"), &["serverAuth"]);
    says(&why("critical", "stranger", "authority"), &["critical extension"]);
    says(&why("small", "small", "authority"), &["less than 2048 bits"]);
    says(&why("server", "stranger", "namesake"), &["a signature of 127.0.0.1 is wrong"]);
    says(&why("server", "stranger", "other"), &["was not issued by an authority in ca_file", "other.pem"]);
    // To accept any certificate is to accept any that can be read.
    let server = Server::start(&workshop, "version1.pem", "stranger.key");
    let url = format!("amqps://127.0.0.1:{}", server.port);
    let any = app(&url, "[broker.tls]\ndanger_accept_any_certificate = true");
    says(&any.publish_pool().connection().unwrap_err().to_string(), &["TLS", "version 1"]);
    // Whom the system trusts is the system's; it is none of these.
    let server = Server::start(&workshop, "server.pem", "stranger.key");
    let text = refused(server.port, &[]);
    assert!(text.contains("that this system trusts; set ca_file") || text.contains("system's store"), "{text}");
}

/// A node whose TLS port has these files.
fn node(workshop: &Workshop, ca: &str, certificate: &str, key: &str, conf: &[&str]) -> (RabbitMq, u16) {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let builder = RabbitMq::builder()
        .conf(format!("listeners.ssl.default = 127.0.0.1:{port}"))
        .conf_file("ssl_options.cacertfile", workshop.file(ca))
        .conf_file("ssl_options.certfile", workshop.file(certificate))
        .conf_file("ssl_options.keyfile", workshop.file(key));
    let builder = conf.iter().fold(builder, |builder, line| builder.conf(*line));
    (builder.start().expect("a RabbitMQ node"), port)
}

#[track_caller]
fn use_it(app: &App) {
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "openssl");
    connection.publish("", &name, "over TLS").unwrap();
    assert_eq!(connection.get_and_ack(&name).unwrap().expect("the message").body(), b"over TLS");
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_self_signed_certificate_in_ca_file_is_trusted_for_its_names_and_its_time() {
    let workshop = Workshop::new();
    // As most write it, and as some do.
    workshop.self_signed("server", &format!("{RSA} {NAMES}"));
    workshop.self_signed("leaf", &format!("{RSA} {NAMES} -addext basicConstraints=critical,CA:FALSE"));
    workshop.self_signed("other", &format!("{RSA} {NAMES}"));
    // openssl makes none that is past.
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    let past = KeyPair::generate().unwrap();
    workshop.write("past.pem", params.self_signed(&past).unwrap().pem());
    workshop.write("past.key", past.serialize_pem());
    for name in ["server", "leaf"] {
        let (certificate, key) = (format!("{name}.pem"), format!("{name}.key"));
        let (_node, port) = node(&workshop, &certificate, &certificate, &key, &[]);
        let ca = workshop.file(&certificate);
        use_it(&with_tls(port, &[("ca_file", &ca)]));
        // Among others it is one of them.
        let both = [fs::read(workshop.file("other.pem")).unwrap(), fs::read(&ca).unwrap()].concat();
        use_it(&with_tls(port, &[("ca_file", &workshop.write("both.pem", both))]));
        // Another of the same name is not it.
        let why = refused(port, &[("ca_file", &workshop.file("other.pem"))]);
        let known = ["ca_file", "a signature of"].iter().any(|part| why.contains(part));
        assert!(known, "{why}");
        let url = format!("amqps://127.0.0.1:{port}");
        let extra =
            format!("[broker.tls]\nca_file = {:?}\nserver_name = \"elsewhere.example\"", ca.display().to_string());
        let error = app(&url, &extra).publish_pool().connection().unwrap_err().to_string();
        says(&error, &["elsewhere.example", "subjectAltName"]);
    }
    let server = Server::start(&workshop, "past.pem", "past.key");
    says(&refused(server.port, &[("ca_file", &workshop.file("past.pem"))]), &["has expired", "2021-01-01T"]);
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn the_commands_of_the_guide_make_certificates_that_work() {
    let guide = fs::read_to_string("docs/security.md").unwrap();
    let commands =
        guide.split("```sh\n").nth(1).and_then(|rest| rest.split("```").next()).expect("commands in the guide");
    let workshop = Workshop::new();
    let output = Command::new("sh").args(["-euc", commands]).current_dir(workshop.0.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let conf = ["ssl_options.verify = verify_peer", "ssl_options.fail_if_no_peer_cert = true"];
    let (_node, port) = node(&workshop, "ca.pem", "server.pem", "server.key", &conf);
    let [ca, certificate, key] = ["ca.pem", "client.pem", "client.key"].map(|name| workshop.file(name));
    let own = [("ca_file", ca.as_path()), ("certificate_file", &certificate), ("key_file", &key)];
    use_it(&with_tls(port, &own));
    let named = app(
        &format!("amqps://localhost:{port}"),
        &format!("[broker.tls]\nca_file = {ca:?}\ncertificate_file = {certificate:?}\nkey_file = {key:?}"),
    );
    use_it(&named);
    let why = refused(port, &own[..1]);
    says(&why, &["alert", "certificate_file and key_file"]);
}
