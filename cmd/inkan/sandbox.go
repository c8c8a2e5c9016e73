package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/daemon"

	"inkan/confine"
)

// sandbox is what a daemon keeps once it has confined itself: what its
// configuration shows it to need, and what the configuration adds.
type sandbox struct {
	room  confine.Room
	hosts []string // that it connects to, by name or address
}

// mayConnect lets it connect to a host and port.
func (s *sandbox) mayConnect(host string, port uint16) {
	s.hosts, s.room.Ports = append(s.hosts, host), append(s.room.Ports, port)
}

// mayReach lets it connect to where a URL leads; without a host, to a unix
// socket's directory that the parameter host names.
func (s *sandbox) mayReach(text string) error {
	u, err := url.Parse(text)
	if err != nil {
		return err
	}
	if dir := u.Query().Get("host"); u.Hostname() == "" && filepath.IsAbs(dir) {
		s.room.Unix = append(s.room.Unix, dir)
		return nil
	}
	number := u.Port()
	if number == "" {
		number = map[string]string{"http": "80", "https": "443", "postgres": "5432", "postgresql": "5432"}[u.Scheme]
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || u.Hostname() == "" {
		return fmt.Errorf("%.64q has no host and port to connect to", u.Redacted())
	}
	s.mayConnect(u.Hostname(), uint16(n))
	return nil
}

// mayLogIn lets it read the client's certificate and key that the URL of a PostgreSQL
// database names, which is done at each connection.
func (s *sandbox) mayLogIn(text string) error {
	u, err := url.Parse(text)
	if err != nil {
		return err
	}
	for _, name := range []string{"sslcert", "sslkey"} {
		if path := u.Query().Get(name); path != "" {
			s.room.Read = append(s.room.Read, filepath.Dir(path))
		}
	}
	return nil
}

// mayUseKey lets it use the device of a key that a URI names.
func (s *sandbox) mayUseKey(uri string) error {
	switch scheme, rest, _ := strings.Cut(uri, ":"); scheme {
	case "tpm":
		address, _, _ := strings.Cut(rest, "?")
		return s.mayUseTPM(address)
	case "pkcs11":
		return s.mayRunWorkers()
	}
	return nil
}

// mayUseTPM lets it use a TPM: a device, or the socket of a software TPM.
func (s *sandbox) mayUseTPM(address string) error {
	fi, err := os.Stat(address)
	if err != nil {
		return err
	}
	if fi.Mode()&fs.ModeSocket != 0 {
		s.room.Unix = append(s.room.Unix, address)
	} else {
		s.room.Write = append(s.room.Write, address)
	}
	return nil
}

// mayRunWorkers lets it run this program again, which then loads a PKCS#11 module.
func (s *sandbox) mayRunWorkers() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	s.room.Execute = append(s.room.Execute, self)
	s.room.Execute = append(s.room.Execute, existing("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/libexec")...)
	s.room.Read = append(s.room.Read, existing("/etc/ld.so.cache", "/etc/ssl", "/etc/pkcs11", "/dev/urandom", "/dev/random")...)
	s.room.Write = append(s.room.Write, "/dev/null")
	return nil
}

// existing returns the paths that are there.
func existing(paths ...string) []string {
	return slices.DeleteFunc(paths, func(p string) bool {
		_, err := os.Stat(p)
		return err != nil
	})
}

// enter confines the process. Names of hosts are resolved over TCP from here on.
func (s *sandbox) enter(log *slog.Logger) error {
	for _, h := range s.hosts {
		if _, err := netip.ParseAddr(h); err != nil {
			s.room.Ports = append(s.room.Ports, 53)
			s.room.Read = append(s.room.Read, existing("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf")...)
			break
		}
	}
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, address string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	}}
	slices.Sort(s.room.Ports)
	s.room.Ports = slices.Compact(s.room.Ports)
	unenforced, err := s.room.Enter()
	if err != nil {
		if r, ok := errors.AsType[*confine.Refusal](err); ok {
			return withCode(exitRefused, r)
		}
		return err
	}
	log.Info("confined", "landlock_abi", confine.ABI(), "unenforced", unenforced, "ports", s.room.Ports, "read", s.room.Read, "write", s.room.Write, "execute", s.room.Execute)
	return nil
}

// notifier tells systemd of the daemon's state, also from inside a sandbox. A
// nil one has nobody to tell.
type notifier struct{ conn net.Conn }

// newNotifier connects to systemd, if it started the process.
func newNotifier() *notifier {
	at := os.Getenv("NOTIFY_SOCKET")
	if at == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: at, Net: "unixgram"})
	if err != nil {
		return nil // as if nobody had asked
	}
	return &notifier{c}
}

func (n *notifier) ready()    { n.tell(daemon.SdNotifyReady) }
func (n *notifier) stopping() { n.tell(daemon.SdNotifyStopping) }

func (n *notifier) tell(state string) {
	if n != nil {
		_, _ = n.conn.Write([]byte(state)) // the daemon does not depend on it
	}
}
