package simulator_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"database/sql"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
	"golang.org/x/sys/unix"

	"inkan/simulator"
)

func database(t *testing.T, url string) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// TestPostgreSQLKeepsItsState: what was committed is there after kill -9.
func TestPostgreSQLKeepsItsState(t *testing.T) {
	p := simulator.PostgreSQLForTest(t)
	db := database(t, p.URL())
	for _, setting := range []string{"fsync", "full_page_writes", "synchronous_commit"} {
		var on string
		if err := db.QueryRowContext(t.Context(), "SHOW "+setting).Scan(&on); err != nil || on != "on" {
			t.Errorf("%s is %q: %v", setting, on, err)
		}
	}
	if _, err := db.ExecContext(t.Context(), "CREATE TABLE n(n BIGINT)"); err != nil {
		t.Fatal(err)
	}
	for i, end := range []func() error{p.Kill, p.Close, p.Kill} {
		if _, err := database(t, p.URL()).ExecContext(t.Context(), "INSERT INTO n VALUES($1)", i); err != nil {
			t.Fatal(err)
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if err := database(t, p.URL()).PingContext(t.Context()); err == nil { // a connection that was open may live a little longer
			t.Fatal("it answers after its end")
		}
		if err := p.Restart(); err != nil {
			t.Fatal(err)
		}
		var n int
		if err := db.QueryRowContext(t.Context(), "SELECT count(*) FROM n").Scan(&n); err != nil || n != i+1 {
			t.Errorf("%d rows, %d were written: %v", n, i+1, err)
		}
	}
	again, err := simulator.StartPostgreSQL(t.Context(), p.Dir)
	if err == nil {
		_ = again.Close()
		t.Error("two servers run on one directory")
	}
}

func TestPostgreSQLPassword(t *testing.T) {
	p := simulator.PostgreSQLForTest(t)
	if err := database(t, strings.Replace(p.URL(), p.Password, "guess", 1)).PingContext(t.Context()); err == nil || !strings.Contains(err.Error(), "28P01") {
		t.Errorf("another password: %v", err)
	}
}

// TestPostgreSQLListens: over TCP with TLS alone.
func TestPostgreSQLListens(t *testing.T) {
	p := simulator.PostgreSQLForTest(t)
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	at, err := p.Listen(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	if err != nil {
		t.Fatal(err)
	}
	url := "postgres://inkan:" + p.Password + "@" + at + "/inkan?sslmode="
	if err := database(t, url+"require").PingContext(t.Context()); err != nil {
		t.Error(err)
	}
	if err := database(t, url+"disable").PingContext(t.Context()); err == nil {
		t.Error("it answers without TLS")
	}
	if err := database(t, p.URL()).PingContext(t.Context()); err == nil {
		t.Error("the socket is where it was, under another port")
	}
}

// TestPostgreSQLNeverLeftBehind: all processes of the server end with the one
// that started it, even if that is killed.
func TestPostgreSQLNeverLeftBehind(t *testing.T) {
	dir, err := os.MkdirTemp("", "pg")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	pid, parent := startAgain(t, "INKAN_SIMULATOR_POSTGRES="+dir)
	fds := []unix.PollFd{}
	children, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/task/" + strconv.Itoa(pid) + "/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range append(strings.Fields(string(children)), strconv.Itoa(pid)) {
		n, err := strconv.Atoi(x)
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PidfdOpen(n, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	if len(fds) < 3 {
		t.Fatalf("a server of %d processes", len(fds))
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait() // it was killed
	for i := range fds {
		if n, err := unix.Poll(fds[i:i+1], 20_000); err != nil || n != 1 {
			t.Errorf("process %d of the server is still there after twenty seconds: %v", i, err)
		}
	}
	again, err := simulator.StartPostgreSQL(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(database(t, again.URL()).PingContext(t.Context()), again.Close()); err != nil {
		t.Error(err)
	}
}

func TestPostgreSQLLongPath(t *testing.T) {
	if _, err := simulator.StartPostgreSQL(context.Background(), "/tmp/"+strings.Repeat("x", 120)); err == nil || errors.Is(err, simulator.ErrMissing) || !strings.Contains(err.Error(), "too long") {
		t.Errorf("got %v", err)
	}
}
