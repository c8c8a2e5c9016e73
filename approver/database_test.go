package approver_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"inkan/approver"
	"inkan/scope"
	"inkan/simulator"
)

// shared is a desk whose approver has its record in PostgreSQL.
type shared struct {
	*desk
	db       *simulator.PostgreSQL
	url      string
	password string // file
	sql      *sql.DB
}

func newShared(t *testing.T) *shared {
	t.Helper()
	server, name := newDatabase(t)
	return newSharedIn(t, server, name)
}

// newSharedAlone has a server that the test may end.
func newSharedAlone(t *testing.T) *shared {
	t.Helper()
	return newSharedIn(t, simulator.PostgreSQLForTest(t), "inkan")
}

func newSharedIn(t *testing.T, server *simulator.PostgreSQL, name string) *shared {
	t.Helper()
	s := &shared{desk: newDesk(t), db: server, url: "postgres://inkan@/" + name + "?host=" + server.Dir, password: filepath.Join(t.TempDir(), "password"), sql: openDatabase(t, server, name)}
	if err := os.WriteFile(s.password, []byte(s.db.Password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// open opens the record and gives it to the desk's approver.
func (s *shared) open(t *testing.T) *approver.Record {
	t.Helper()
	r, err := approver.OpenSharedRecord(t.Context(), s.url, s.password)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	s.approver = s.newApprover(t, config(t, ""), r)
	return r
}

func (s *shared) exec(t *testing.T, statement string, args ...any) {
	t.Helper()
	if _, err := s.sql.ExecContext(t.Context(), statement, args...); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

// TestSharedRecord: what one approver wrote the other counts, and a new one reads.
func TestSharedRecord(t *testing.T) {
	s := newShared(t)
	s.open(t)
	a := s.approver
	s.open(t)
	b := s.approver
	for i, x := range []*approver.Approver{a, a, b, a, b, b} {
		s.approver = x
		if err := s.decide(s.request(s.write(t, s.next(t, "60", nil)))); err != nil { // 3,000 each
			t.Fatalf("statement %d: %v", i+1, err)
		}
	}
	s.open(t)
	for i, x := range []*approver.Approver{a, b, s.approver} {
		s.approver = x
		refused(t, "more than is left", scope.RuleNotionalWindow, s.decide(s.request(s.next(t, "41", nil))))
		refused(t, "another first statement", approver.RuleFork, s.decide(s.request(s.next(t, "1", func(st *scope.Statement) { st.Counter, st.Previous = 1, scope.Digest{} }))))
		if err := s.decide(s.request(s.log[i])); err != nil {
			t.Errorf("statement %d, again by another approver: %v", i+1, err)
		}
	}
	var authorized int
	if err := s.sql.QueryRowContext(t.Context(), "SELECT sum(authorized) FROM entry").Scan(&authorized); err != nil || authorized != 9 {
		t.Errorf("the record has %d authorizations, 9 were given: %v", authorized, err)
	}
}

// TestSharedRecordOpensAtOnce: approvers that start together make the tables once.
func TestSharedRecordOpensAtOnce(t *testing.T) {
	s := newShared(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			r, err := approver.OpenSharedRecord(t.Context(), s.url, s.password)
			if err != nil {
				t.Error(err)
				return
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	s.exec(t, "UPDATE record SET version = 3")
	if _, err := approver.OpenSharedRecord(t.Context(), s.url, s.password); err == nil || !strings.Contains(err.Error(), "version 3, this program knows version 2") {
		t.Errorf("tables of a later version: %v", err)
	}
}

// TestDatabaseEnds: without its database an approver refuses; when that is back
// it goes on by itself, whatever connections it had.
func TestDatabaseEnds(t *testing.T) {
	s := newSharedAlone(t)
	s.open(t)
	var wg sync.WaitGroup
	first := s.write(t, s.next(t, "1", nil))
	for range 16 { // as many connections as there may be
		wg.Go(func() {
			if err := s.decide(s.request(first)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, end := range []func() error{s.db.Kill, s.db.Close} {
		b := s.next(t, "1", nil)
		if err := end(); err != nil {
			t.Fatal(err)
		}
		refused(t, "no database", approver.RuleRecord, s.decide(s.request(b)))
		if err := s.db.Restart(); err != nil {
			t.Fatal(err)
		}
		if err := s.decide(s.request(s.write(t, b))); err != nil {
			t.Errorf("after the database's restart: %v", err)
		}
		// Restarted between two requests, which never saw it gone.
		if err := errors.Join(end(), s.db.Restart()); err != nil {
			t.Fatal(err)
		}
		if err := s.decide(s.request(s.write(t, s.next(t, "1", nil)))); err != nil {
			t.Errorf("after a restart that was not seen: %v", err)
		}
	}
}

// TestDatabaseIsSlow: a request that waits for the database ends with its
// caller's patience, refused, and the next one is not in its way.
func TestDatabaseIsSlow(t *testing.T) {
	s := newShared(t)
	s.open(t)
	if err := s.decide(s.request(s.write(t, s.next(t, "1", nil)))); err != nil {
		t.Fatal(err)
	}
	tx, err := s.sql.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(t.Context(), "SELECT 1 FROM agent FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	b := s.next(t, "1", nil)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, err := s.approver.Decide(ctx, s.client, s.request(b))
		cancel()
		refused(t, "the agent's row is held", approver.RuleRecord, err)
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if err := s.decide(s.request(s.write(t, b))); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// TestDatabaseMustBeDurable: one that acknowledges what is not on disk is refused.
func TestDatabaseMustBeDurable(t *testing.T) {
	s := newSharedAlone(t)
	s.exec(t, "ALTER ROLE inkan SET synchronous_commit = off") // overridden
	s.open(t)
	if err := s.decide(s.request(s.write(t, s.next(t, "1", nil)))); err != nil {
		t.Fatal(err)
	}
	s.exec(t, "ALTER SYSTEM SET fsync = off")
	s.exec(t, "SELECT pg_reload_conf()")
	b := s.next(t, "1", nil)
	for { // until the server has read it
		var fsync string
		if err := s.sql.QueryRowContext(t.Context(), "SHOW fsync").Scan(&fsync); err != nil {
			t.Fatal(err)
		}
		if fsync == "off" {
			break
		}
	}
	refused(t, "fsync is off", approver.RuleRecord, s.decide(s.request(b)))
	if _, err := approver.OpenSharedRecord(t.Context(), s.url, s.password); err == nil || !strings.Contains(err.Error(), `fsync "off", on is expected`) {
		t.Errorf("fsync is off: %v", err)
	}
	s.exec(t, "ALTER SYSTEM RESET fsync")
	// What a session says of itself is looked at, not what was asked for.
	s.exec(t, "CREATE SCHEMA other")
	s.exec(t, "CREATE FUNCTION other.current_setting(text) RETURNS text LANGUAGE sql AS $$ SELECT CASE $1 WHEN 'synchronous_commit' THEN 'local' ELSE 'on' END $$")
	s.exec(t, "ALTER ROLE inkan SET search_path = other, pg_catalog, public")
	if _, err := approver.OpenSharedRecord(t.Context(), s.url, s.password); err == nil || !strings.Contains(err.Error(), `synchronous_commit "local", on is expected`) {
		t.Errorf("synchronous_commit is local: %v", err)
	}
}

// TestFailedCommit: the consent is signed while the record is committed; a
// commit that fails releases none.
func TestFailedCommit(t *testing.T) {
	s := newShared(t)
	s.open(t)
	s.exec(t, "CREATE FUNCTION fails() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$")
	s.exec(t, "CREATE CONSTRAINT TRIGGER fails AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fails()")
	b := s.write(t, s.next(t, "100", nil))
	x, err := s.approver.Decide(t.Context(), s.client, s.request(b))
	if x != nil {
		t.Error("an authorization was given")
	}
	refused(t, "the commit fails", approver.RuleRecord, err)
	s.exec(t, "DROP TRIGGER fails ON entry")
	if err := s.decide(s.request(b)); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	var authorized int
	if err := s.sql.QueryRowContext(t.Context(), "SELECT sum(authorized) FROM entry").Scan(&authorized); err != nil || authorized != 1 {
		t.Errorf("the record has %d authorizations, one was given: %v", authorized, err)
	}
}

// TestDatabaseWentBack: an older copy of the data in place of the database's is
// refused by an approver that saw more of it. One that starts then asks for what is missing.
func TestDatabaseWentBack(t *testing.T) {
	s := newSharedAlone(t)
	s.open(t)
	for range 2 {
		if err := s.decide(s.request(s.write(t, s.next(t, "10", nil)))); err != nil {
			t.Fatal(err)
		}
	}
	data, backup := filepath.Join(s.db.Dir, "data"), filepath.Join(s.db.Dir, "backup")
	if err := s.db.Close(); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", data, backup).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	if err := s.db.Restart(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.decide(s.request(s.write(t, s.next(t, "100", nil)))); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(s.db.Kill(), os.Rename(data, data+".lost"), os.Rename(backup, data), s.db.Restart()); err != nil {
		t.Fatal(err)
	}
	next := s.write(t, s.next(t, "10", nil))
	refused(t, "the record went back", approver.RuleRecord, s.decide(s.request(next, s.log[2:4]...)))
	fork := s.next(t, "1", func(st *scope.Statement) {
		st.Counter, st.Previous = 3, sha256.Sum256(s.log[1])
	})
	refused(t, "a fork of what was lost", approver.RuleRecord, s.decide(s.request(fork)))
	s.open(t)
	err := s.decide(s.request(next))
	refused(t, "entries that were lost", approver.RuleGap, err)
	if r, ok := errors.AsType[*scope.Refusal](err); ok && r.Value != "2" {
		t.Errorf("the approver says it has %s entries", r.Value)
	}
	if err := s.decide(s.request(next, s.log[2:4]...)); err != nil {
		t.Errorf("with the entries that were lost: %v", err)
	}
}

// TestDatabaseGrewOtherwise: another approver filled a record that went back
// with other entries, more than there were before.
func TestDatabaseGrewOtherwise(t *testing.T) {
	s := newShared(t)
	s.open(t)
	if err := s.decide(s.request(s.write(t, s.next(t, "10", nil)))); err != nil {
		t.Fatal(err)
	}
	s.exec(t, "DELETE FROM entry")
	s.exec(t, "DELETE FROM agent")
	old := s.approver
	s.book, s.counter, s.previous = scope.NewBook(), 0, scope.Digest{}
	s.open(t)
	for range 2 {
		if err := s.decide(s.request(s.write(t, s.next(t, "10", nil)))); err != nil {
			t.Fatal(err)
		}
		current := s.approver
		s.approver = old
		refused(t, "other entries", approver.RuleRecord, s.decide(s.request(s.next(t, "10", nil))))
		s.approver = current
	}
}

// TestDatabaseDamaged: a head that is not that of the last entry is refused.
func TestDatabaseDamaged(t *testing.T) {
	for name, damage := range map[string]string{
		"the last entry is gone":      "DELETE FROM entry WHERE counter = 2",
		"all are gone":                "DELETE FROM entry",
		"another entry":               "UPDATE entry SET statement = (SELECT statement FROM entry WHERE counter = 1) WHERE counter = 2",
		"an entry that is none":       "UPDATE entry SET statement = 'x' WHERE counter = 2",
		"a head that is too short":    "UPDATE agent SET previous = 'x'",
		"a head of another statement": "UPDATE agent SET previous = decode(repeat('00', 32), 'hex')",
	} {
		t.Run(name, func(t *testing.T) {
			s := newShared(t)
			s.open(t)
			for range 2 {
				if err := s.decide(s.request(s.write(t, s.next(t, "1", nil)))); err != nil {
					t.Fatal(err)
				}
			}
			s.exec(t, damage)
			s.open(t)
			refused(t, name, approver.RuleRecord, s.decide(s.request(s.next(t, "1", nil))))
		})
	}
}

func TestDatabasePassword(t *testing.T) {
	s := newShared(t)
	path := filepath.Join(t.TempDir(), "password")
	for _, x := range []struct {
		name, text string
		mode       os.FileMode
		want       string
	}{
		{"a wrong one", "guess-4711\n", 0o600, "28P01"},
		{"an empty one", "", 0o600, "one line"},
		{"two lines", s.db.Password + "\nx\n", 0o600, "one line"},
		{"a file that others read", s.db.Password + "\n", 0o640, "others than its owner may read it"},
	} {
		if err := errors.Join(os.WriteFile(path, []byte(x.text), 0o600), os.Chmod(path, x.mode)); err != nil {
			t.Fatal(err)
		}
		_, err := approver.OpenSharedRecord(t.Context(), s.url, path)
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, %q is expected", x.name, err, x.want)
		} else if strings.Contains(err.Error(), "guess") || strings.Contains(err.Error(), s.db.Password) {
			t.Errorf("%s: the error shows a password", x.name)
		}
	}
	// The driver would take one from the environment.
	t.Setenv("PGPASSWORD", s.db.Password)
	t.Setenv("PGUSER", "inkan")
	if _, err := approver.OpenSharedRecord(t.Context(), s.url, ""); err == nil {
		t.Error("a password was taken from the environment")
	}
	if _, err := approver.OpenSharedRecord(t.Context(), s.url, filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "record_password_file") {
		t.Errorf("no file: %v", err)
	}
}

// TestDatabaseTLS: over TCP the server must be the one in the URL.
func TestDatabaseTLS(t *testing.T) {
	s := newSharedAlone(t)
	certificate, key := s.serverPEM(t, "localhost")
	at, err := s.db.Listen(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(at)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ca, other := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "other.pem")
	for path, c := range map[string]*x509.Certificate{ca: s.ca.Certificate, other: newDesk(t).ca.Certificate} {
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range []struct{ name, url, want string }{
		{"the server in the URL", "postgres://inkan@localhost:" + port + "/inkan?sslrootcert=" + ca, ""},
		{"the same, spelled out", "postgres://inkan@localhost:" + port + "/inkan?sslmode=verify-full&sslrootcert=" + ca, ""},
		{"another name", "postgres://inkan@127.0.0.1:" + port + "/inkan?sslrootcert=" + ca, "certificate"},
		{"another CA", "postgres://inkan@localhost:" + port + "/inkan?sslrootcert=" + other, "certificate"},
		{"the system's roots", "postgres://inkan@localhost:" + port + "/inkan", "certificate"},
		{"no TLS where the server wants it", "postgres://inkan@localhost:" + port + "/inkan?sslmode=disable", "28000"},
		{"no such file", "postgres://inkan@localhost:" + port + "/inkan?sslrootcert=/nowhere", "sslrootcert"},
		{"no such client certificate", "postgres://inkan@localhost:" + port + "/inkan?sslcert=/nowhere&sslkey=/nowhere", "sslcert"},
	} {
		r, err := approver.OpenSharedRecord(t.Context(), x.url, s.password)
		if err == nil {
			_ = r.Close()
		}
		if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, %q is expected", x.name, err, x.want)
		}
	}
	// A server without TLS, in whose place anybody may be.
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	go func() {
		c, err := plain.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		var b [8]byte
		_, _ = c.Read(b[:])
		_, _ = c.Write([]byte("N"))
		_, _ = c.Read(b[:])
	}()
	_, plainPort, _ := net.SplitHostPort(plain.Addr().String())
	if _, err := approver.OpenSharedRecord(t.Context(), "postgres://inkan@localhost:"+plainPort+"/inkan?sslrootcert="+ca, s.password); err == nil || !strings.Contains(err.Error(), "TLS") {
		t.Errorf("a server that refuses TLS: %v", err)
	}
}

func TestDatabaseURL(t *testing.T) {
	base := "listen: x\ntrust_domain: example.org\nkey: x\ncertificate: c\ncertificate_key: k\nca: ca\ncrl_url: x\nagents: [{name: mm-07}]\nrecord: "
	for _, x := range []struct{ url, want string }{
		{"postgres://inkan@db.example.org/inkan", ""},
		{"postgresql://inkan@db.example.org:6432/inkan?sslmode=verify-full&sslrootcert=/etc/ca.pem&sslcert=/etc/c.pem&sslkey=/etc/k.pem", ""},
		{"postgres://inkan@/inkan?host=/run/postgresql", ""},
		{"postgres://inkan@127.0.0.1/inkan?sslmode=disable", ""},
		{"postgres://inkan@[::1]/inkan?sslmode=disable", ""},
		{"postgres://inkan:s3cret@db.example.org/inkan", "record_password_file"},
		{"postgres://inkan@db.example.org/inkan?password=s3cret", `option "password" is not known`},
		{"postgres://inkan@db.example.org/inkan?sslmode=disable", "this machine alone"},
		{"postgres://inkan@db.example.org/inkan?sslmode=require", "verify-full is the only one"},
		{"postgres://inkan@db.example.org/inkan?sslmode=prefer", "verify-full is the only one"},
		{"postgres://inkan@db.example.org/inkan?sslrootcert=ca.pem", "absolute path"},
		{"postgres://inkan@db.example.org/inkan?sslrootcert=/a&sslrootcert=/b", "twice"},
		{"postgres://inkan@db.example.org/inkan?sslcert=/a", "belong together"},
		{"postgres://inkan@db.example.org/inkan?synchronous_commit=off", "is not known"},
		{"postgres://inkan@db.example.org/inkan?options=-c%20synchronous_commit%3Doff", "is not known"},
		{"postgres://inkan@db.example.org/inkan?host=/run/postgresql", "host stands twice"},
		{"postgres://inkan@/inkan?host=/run/postgresql&sslmode=verify-full", "no TLS on a unix socket"},
		{"postgres://inkan@127.0.0.1/inkan?sslmode=disable&sslrootcert=/a", "takes no certificates"},
		{"postgres://inkan@a,b/inkan", "one host"},
		{"postgres://inkan@/inkan", "one host"},
		{"postgres://db.example.org/inkan", "user is missing"},
		{"postgres://inkan@db.example.org", "name of the database"},
		{"postgres://inkan@db.example.org:70000/inkan", "port"},
		{"postgres:inkan", "malformed"},
		{"postgres://inkan@db.example.org/inkan#x", "malformed"},
		{"postgres://in%zzkan:s3cret@db/inkan", "malformed"},
	} {
		_, err := approver.ParseConfig([]byte(base+"\""+x.url+"\"\n"), "/")
		if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, %q is expected", x.url, err, x.want)
		} else if err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: the error shows the password", x.url)
		}
	}
}

// serverPEM is a TLS certificate of the desk's CA for a name, and its key.
func (d *desk) serverPEM(t testing.TB, name string) (certificate, key []byte) {
	t.Helper()
	k := newKey(t)
	c := &x509.Certificate{SerialNumber: big.NewInt(99), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, d.ca.Certificate, k.Public(), d.ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	certificate, key = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
	if _, err := tls.X509KeyPair(certificate, key); err != nil {
		t.Fatal(err)
	}
	return certificate, key
}

func TestExamples(t *testing.T) {
	for _, name := range []string{"approver.yaml", "approver-shared.yaml"} {
		b, err := os.ReadFile(filepath.Join("../examples", name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := approver.ParseConfig(b, "../examples"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
