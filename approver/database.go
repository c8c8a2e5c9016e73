package approver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	_ "modernc.org/sqlite" // the driver "sqlite"
)

// schemaVersion is of the tables below. A record of another version is refused.
const schemaVersion = 1

// The record is a copy of what each agent's signer wrote down, denials too,
// and what was authorized of it. Both databases know these types.
const schema = `
CREATE TABLE IF NOT EXISTS record(
	one     BIGINT PRIMARY KEY CHECK(one = 1),
	version BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS agent(
	agent    TEXT PRIMARY KEY,
	size     BIGINT NOT NULL,           -- entries
	previous BYTEA NOT NULL,            -- SHA-256 of the last one
	time     BIGINT NOT NULL            -- of the last one, in microseconds since 1970
);
CREATE TABLE IF NOT EXISTS entry(
	agent      TEXT NOT NULL,
	counter    BIGINT NOT NULL,
	statement  BYTEA NOT NULL,
	time       BIGINT NOT NULL,
	verdict    TEXT NOT NULL,           -- of the limits over time: permit, deny, event, unchecked, or a rule and a message
	authorized BIGINT NOT NULL,         -- how often
	PRIMARY KEY(agent, counter)
);
`

// Bounds of what a database may take.
const (
	patience       = 10 * time.Second // one request
	connectTimeout = 5 * time.Second
	maxConnections = 16
	maxPassword    = 1024 // bytes
)

// schemaLock is held while the tables are made, so that approvers that start
// together do not both make them.
const schemaLock = 0x696e6b616e

// OpenRecord opens or makes the record of one approver in a file.
func OpenRecord(ctx context.Context, path string) (*Record, error) {
	db, err := sql.Open("sqlite", "file:"+path+"?_txlock=immediate&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=busy_timeout(5000)")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	r := &Record{db: db, agents: make(map[string]*ledger)}
	if err = r.prepare(ctx); err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the record %s: %w", path, err), db.Close())
	}
	return r, nil
}

// OpenSharedRecord opens or makes the record that several approvers share, in
// the PostgreSQL database that a URL names:
//
//	postgres://user@host:port/database?sslrootcert=/path/ca.pem
//	postgres://user@/database?host=/run/postgresql
//
// sslcert and sslkey name a client's certificate and its key. Over TCP the
// server's certificate is verified, for the name in the URL; sslmode=disable is for this machine alone.
// passwordFile is read at each connection; empty: there is no password.
func OpenSharedRecord(ctx context.Context, url, passwordFile string) (*Record, error) {
	at, err := parsePostgres(url)
	if err != nil {
		return nil, err
	}
	config, err := at.config()
	if err != nil {
		return nil, err
	}
	r := &Record{postgres: true, agents: make(map[string]*ledger)}
	r.db = sql.OpenDB(stdlib.GetConnector(*config, stdlib.OptionBeforeConnect(func(_ context.Context, c *pgx.ConnConfig) (err error) {
		c.Password, err = readPassword(passwordFile)
		return err
	})))
	r.db.SetMaxOpenConns(maxConnections)
	r.db.SetMaxIdleConns(maxConnections)
	r.db.SetConnMaxIdleTime(5 * time.Minute)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := r.prepare(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the record in database %s at %s: %w", at.database, at.address(), err), r.db.Close())
	}
	return r, nil
}

// prepare makes the tables where they are missing and refuses those of another version.
func (r *Record) prepare(ctx context.Context) error {
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // after Commit it does nothing
	if r.postgres {
		if _, err := tx.ExecContext(ctx, "SELECT pg_advisory_xact_lock($1)", int64(schemaLock)); err != nil {
			return err
		}
		if err := durableSession(ctx, tx); err != nil {
			return err
		}
	}
	for statement := range strings.SplitSeq(schema, ";\n") {
		if _, err := tx.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO record(one, version) VALUES(1, $1) ON CONFLICT(one) DO NOTHING", schemaVersion); err != nil {
		return err
	}
	var version int64
	if err := tx.QueryRowContext(ctx, "SELECT version FROM record").Scan(&version); err != nil {
		return err
	}
	if version != schemaVersion {
		return fmt.Errorf("its tables are of version %d, this program knows version %d", version, schemaVersion)
	}
	return tx.Commit()
}

// durableSession refuses a server that would acknowledge what is not on disk.
func durableSession(ctx context.Context, tx *sql.Tx) error {
	var commit, sync string
	if err := tx.QueryRowContext(ctx, "SELECT current_setting('synchronous_commit'), current_setting('fsync')").Scan(&commit, &sync); err != nil {
		return err
	}
	return durable(commit, sync)
}

func durable(commit, sync string) error {
	if commit != "on" && commit != "remote_apply" {
		return fmt.Errorf("the database has synchronous_commit %.16q, on is expected: what it acknowledges could be lost", commit)
	}
	if sync != "on" {
		return fmt.Errorf("the database has fsync %.16q, on is expected: what it acknowledges could be lost", sync)
	}
	return nil
}

// postgresURL is where a shared record is.
type postgresURL struct {
	host, database, user    string // host: a name, an address, or the directory of a socket
	port                    uint16
	tls                     bool
	rootCert, cert, certKey string // PEM files; no rootCert: the system's roots
}

// isShared says whether a record's place is a PostgreSQL database's URL, not a file.
func isShared(record string) bool {
	return strings.HasPrefix(record, "postgres:") || strings.HasPrefix(record, "postgresql:")
}

// parsePostgres reads a URL, strictly: an option that is not known, such as one
// that would ask for less, is refused. No error quotes the URL.
func parsePostgres(s string) (*postgresURL, error) {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("record: %s; postgres://user@host/database is expected", fmt.Sprintf(format, a...))
	}
	u, err := url.Parse(s)
	if err != nil || !isShared(s) || u.Opaque != "" || u.Fragment != "" {
		return nil, bad("the URL of the database is malformed")
	}
	if _, has := u.User.Password(); has {
		return nil, bad("a password in the URL ends up where everybody reads it: put it into record_password_file")
	}
	at := &postgresURL{host: u.Hostname(), database: strings.TrimPrefix(u.Path, "/"), user: u.User.Username(), port: 5432}
	if p := u.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return nil, bad("port %.8q is none", p)
		}
		at.port = uint16(n)
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, bad("the options of the URL are malformed")
	}
	mode := "verify-full"
	for name, values := range query {
		to := map[string]*string{"sslmode": &mode, "sslrootcert": &at.rootCert, "sslcert": &at.cert, "sslkey": &at.certKey, "host": &at.host}[name]
		switch {
		case to == nil:
			return nil, bad("option %.32q is not known: host, sslmode, sslrootcert, sslcert and sslkey are", name)
		case len(values) != 1 || values[0] == "":
			return nil, bad("option %s stands twice or has no value", name)
		case name != "sslmode" && !filepath.IsAbs(values[0]):
			return nil, bad("option %s must be an absolute path", name)
		case name == "host" && at.host != "":
			return nil, bad("the host stands twice")
		}
		*to = values[0]
	}
	onSocket := filepath.IsAbs(at.host)
	switch {
	case at.host == "" || strings.Contains(at.host, ","):
		return nil, bad("one host, or host= with the directory of a socket, is expected")
	case at.database == "" || strings.Contains(at.database, "/"):
		return nil, bad("the name of the database is missing")
	case at.user == "":
		return nil, bad("the user is missing")
	case (at.cert == "") != (at.certKey == ""):
		return nil, bad("sslcert and sslkey belong together")
	case onSocket && (query.Has("sslmode") || at.rootCert != "" || at.cert != ""):
		return nil, bad("there is no TLS on a unix socket")
	case mode == "disable" && !isLoopback(at.host):
		return nil, bad("sslmode=disable is for a server on this machine alone")
	case mode == "disable" && (at.rootCert != "" || at.cert != ""):
		return nil, bad("sslmode=disable takes no certificates")
	case mode != "disable" && mode != "verify-full":
		return nil, bad("sslmode %.16q does not make sure of the server: verify-full is the only one, and the default", mode)
	}
	at.tls = !onSocket && mode == "verify-full"
	return at, nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (p *postgresURL) address() string {
	if filepath.IsAbs(p.host) {
		return p.host
	}
	return net.JoinHostPort(p.host, strconv.Itoa(int(p.port)))
}

// config makes what the driver takes. The driver's own defaults come from the
// environment and from files in the home directory, so each is overwritten.
func (p *postgresURL) config() (*pgx.ConnConfig, error) {
	c, err := pgx.ParseConfig("host=/nowhere user=nobody dbname=none sslmode=disable target_session_attrs=read-write")
	if err != nil {
		return nil, fmt.Errorf("record: the environment's settings for PostgreSQL are in the way: %w", err)
	}
	c.Host, c.Port, c.Database, c.User, c.Password = p.host, p.port, p.database, p.user, ""
	c.Fallbacks, c.TLSConfig, c.ConnectTimeout = nil, nil, connectTimeout
	c.RuntimeParams = map[string]string{
		"application_name":   "inkan approver",
		"synchronous_commit": "on",
		// An approver whose host is gone must not hold an agent's row for long.
		"idle_in_transaction_session_timeout": strconv.Itoa(int(patience.Milliseconds())),
		"lock_timeout":                        strconv.Itoa(int(patience.Milliseconds())),
	}
	if !p.tls {
		return c, nil
	}
	c.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: p.host}
	if p.rootCert != "" {
		b, err := os.ReadFile(p.rootCert)
		if err != nil {
			return nil, fmt.Errorf("record: sslrootcert: %w", err)
		}
		c.TLSConfig.RootCAs = x509.NewCertPool()
		if !c.TLSConfig.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("record: sslrootcert: %s has no certificate", p.rootCert)
		}
	}
	if p.cert != "" {
		if _, err := tls.LoadX509KeyPair(p.cert, p.certKey); err != nil {
			return nil, fmt.Errorf("record: sslcert: %w", err)
		}
		c.TLSConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(p.cert, p.certKey) // it may have been renewed
			return &pair, err
		}
	}
	return c, nil
}

// readPassword reads a password from a file that its owner alone may read. One
// newline at the end is cut.
func readPassword(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	fi, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("record_password_file: %w", err)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("record_password_file: %s has mode %04o: others than its owner may read it", path, fi.Mode().Perm())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("record_password_file: %w", err)
	}
	s := strings.TrimSuffix(string(b), "\n")
	if s == "" || len(s) > maxPassword || strings.ContainsAny(s, "\n\x00") {
		return "", fmt.Errorf("record_password_file: %s: one line of 1 to %d bytes is expected", path, maxPassword)
	}
	return s, nil
}
