// Package postgres opens PostgreSQL databases for parts that keep there what
// must not be lost: [Parse] reads a URL, [Server.Open] connects, [Durable] refuses
// a server that loses things.
package postgres

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
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
)

// Patience bounds what a request may wait for a database, locks included.
const Patience = 10 * time.Second

// Bounds of what a database may take.
const (
	connectTimeout = 5 * time.Second
	MaxConnections = 16   // of one pool
	maxPassword    = 1024 // bytes
)

// Open makes a pool of connections; the first is made when it is needed. The
// password file is read at each connection; empty: there is no password.
func (p *Server) Open(application, passwordFile string) (*sql.DB, error) {
	config, err := p.config(application)
	if err != nil {
		return nil, err
	}
	db := sql.OpenDB(stdlib.GetConnector(*config, stdlib.OptionBeforeConnect(func(_ context.Context, c *pgx.ConnConfig) (err error) {
		c.Password, err = p.password(passwordFile)
		return err
	})))
	db.SetMaxOpenConns(MaxConnections)
	db.SetMaxIdleConns(MaxConnections)
	db.SetConnMaxIdleTime(5 * time.Minute)
	return db, nil
}

// String names database and server, and nothing else of the URL.
func (p *Server) String() string { return "database " + p.database + " at " + p.address() }

// Durable refuses a server that would acknowledge what is not on disk.
func Durable(ctx context.Context, tx *sql.Tx) error {
	var commit, sync string
	if err := tx.QueryRowContext(ctx, "SELECT current_setting('synchronous_commit'), current_setting('fsync')").Scan(&commit, &sync); err != nil {
		return err
	}
	return OnDisk(commit, sync)
}

// OnDisk says so of the settings synchronous_commit and fsync.
func OnDisk(commit, sync string) error {
	if commit != "on" && commit != "remote_apply" {
		return fmt.Errorf("the database has synchronous_commit %.16q, on is expected: what it acknowledges could be lost", commit)
	}
	if sync != "on" {
		return fmt.Errorf("the database has fsync %.16q, on is expected: what it acknowledges could be lost", sync)
	}
	return nil
}

// Server is where a database is, and how it is reached.
type Server struct {
	setting                 string // name of the setting that the URL stands in
	host, database, user    string // host: a name, an address, or the directory of a socket
	port                    uint16
	tls                     bool
	rootCert, cert, certKey string // PEM files; no rootCert: the system's roots
}

// IsURL says whether a setting is a PostgreSQL database's URL, not a file.
func IsURL(s string) bool {
	return strings.HasPrefix(s, "postgres:") || strings.HasPrefix(s, "postgresql:")
}

// Parse reads the URL in a setting, strictly: an option that is not known, such
// as one that would ask for less, is refused. No error quotes the URL. The
// setting for the password's file has the name of this one and _password_file.
//
//	postgres://user@host:port/database?sslrootcert=/path/ca.pem
//	postgres://user@/database?host=/run/postgresql
//
// sslcert and sslkey name a client's certificate and its key. Over TCP the
// server's certificate is verified, for the name in the URL; sslmode=disable is for this machine alone.
func Parse(setting, s string) (*Server, error) {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%s: %s; postgres://user@host/database is expected", setting, fmt.Sprintf(format, a...))
	}
	u, err := url.Parse(s)
	if err != nil || !IsURL(s) || u.Opaque != "" || u.Fragment != "" {
		return nil, bad("the URL of the database is malformed")
	}
	if _, has := u.User.Password(); has {
		return nil, bad("a password in the URL ends up where everybody reads it: put it into %s_password_file", setting)
	}
	at := &Server{setting: setting, host: u.Hostname(), database: strings.TrimPrefix(u.Path, "/"), user: u.User.Username(), port: 5432}
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

func (p *Server) address() string {
	if filepath.IsAbs(p.host) {
		return p.host
	}
	return net.JoinHostPort(p.host, strconv.Itoa(int(p.port)))
}

// config makes what the driver takes. The driver's own defaults come from the
// environment and from files in the home directory, so each is overwritten.
func (p *Server) config(application string) (*pgx.ConnConfig, error) {
	c, err := pgx.ParseConfig("host=/nowhere user=nobody dbname=none sslmode=disable target_session_attrs=read-write")
	if err != nil {
		return nil, fmt.Errorf("%s: the environment's settings for PostgreSQL are in the way: %w", p.setting, err)
	}
	c.Host, c.Port, c.Database, c.User, c.Password = p.host, p.port, p.database, p.user, ""
	c.Fallbacks, c.TLSConfig, c.ConnectTimeout = nil, nil, connectTimeout
	c.RuntimeParams = map[string]string{
		"application_name":   application,
		"synchronous_commit": "on",
		// A client whose host is gone must not hold a row for long.
		"idle_in_transaction_session_timeout": strconv.Itoa(int(Patience.Milliseconds())),
		"lock_timeout":                        strconv.Itoa(int(Patience.Milliseconds())),
	}
	if !p.tls {
		return c, nil
	}
	c.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: p.host}
	if p.rootCert != "" {
		b, err := os.ReadFile(p.rootCert)
		if err != nil {
			return nil, fmt.Errorf("%s: sslrootcert: %w", p.setting, err)
		}
		c.TLSConfig.RootCAs = x509.NewCertPool()
		if !c.TLSConfig.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("%s: sslrootcert: %s has no certificate", p.setting, p.rootCert)
		}
	}
	if p.cert != "" {
		if _, err := tls.LoadX509KeyPair(p.cert, p.certKey); err != nil {
			return nil, fmt.Errorf("%s: sslcert: %w", p.setting, err)
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
func (p *Server) password(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	fi, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("%s_password_file: %w", p.setting, err)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s_password_file: %s has mode %04o: others than its owner may read it", p.setting, path, fi.Mode().Perm())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("%s_password_file: %w", p.setting, err)
	}
	s := strings.TrimSuffix(string(b), "\n")
	if s == "" || len(s) > maxPassword || strings.ContainsAny(s, "\n\x00") {
		return "", fmt.Errorf("%s_password_file: %s: one line of 1 to %d bytes is expected", p.setting, path, maxPassword)
	}
	return s, nil
}
