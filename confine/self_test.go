package confine_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"inkan/confine"
)

// TestMain is also the process that confines itself.
func TestMain(m *testing.M) {
	if text := os.Getenv("CONFINE_ROOM"); text != "" {
		if err := confined(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// tried is what a confined process tries, with arguments from the test.
var tried = map[string]func(arg string) error{
	"read":   func(p string) error { _, err := os.ReadFile(p); return err },
	"write":  func(p string) error { return os.WriteFile(p, []byte("x"), 0o600) },
	"rename": func(p string) error { return os.Rename(p, p+".moved") },
	"dial": func(at string) error {
		c, err := net.DialTimeout("tcp", at, 5*time.Second)
		if err == nil {
			_ = c.Close()
		}
		return err
	},
	"unix": func(at string) error {
		c, err := net.Dial("unix", at)
		if err == nil {
			_ = c.Close()
		}
		return err
	},
	"listen": func(string) error { _, err := net.Listen("tcp", "127.0.0.1:0"); return err },
	"udp":    func(string) error { _, err := net.Dial("udp", "127.0.0.1:53"); return err },
	"run":    func(p string) error { return exec.Command(p).Run() },
	"mptcp": func(string) error {
		_, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
		return err
	},
	"route":   func(at string) error { return route(unix.AF_INET, unix.IPPROTO_IP, unix.IP_OPTIONS, lsrr, at) },
	"route6":  func(at string) error { return route(unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_RTHDR, srh, at) },
	"route62": func(at string) error { return route(unix.AF_INET6, unix.IPPROTO_IPV6, 6, srh, at) }, // IPV6_2292PKTOPTIONS
	"ttl": func(at string) error {
		return route(unix.AF_INET, unix.IPPROTO_IP, unix.IP_TTL, "\x40\x00\x00\x00", at)
	},
	"ptrace":  func(pid string) error { n, _ := strconv.Atoi(pid); return unix.PtraceAttach(n) },
	"signal":  func(pid string) error { n, _ := strconv.Atoi(pid); return unix.Kill(n, 0) },
	"environ": func(pid string) error { _, err := os.ReadFile("/proc/" + pid + "/environ"); return err },
	"accept": func(string) error {
		if _, err := net.DialTimeout("tcp", listener.Addr().String(), 5*time.Second); err != nil {
			return err
		}
		_, err := listener.Accept()
		return err
	},
}

// A loose source route by 127.0.0.9, and a segment routing header by ::1: the packets
// of a connection go where these say.
const (
	lsrr = "\x83\x07\x04\x7f\x00\x00\x09\x00"
	srh  = "\x00\x02\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"
)

func route(family, level, option int, value, _ string) error {
	fd, err := unix.Socket(family, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.SetsockoptString(fd, level, option, value)
}

var listener net.Listener // opened before the process confines itself

// confined enters the room and tries everything, each on several threads.
func confined(text string) error {
	var q struct {
		Room confine.Room
		Try  [][2]string
	}
	if err := json.Unmarshal([]byte(text), &q); err != nil {
		return err
	}
	var err error
	if listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return err
	}
	q.Room.Ports = append(q.Room.Ports, uint16(listener.Addr().(*net.TCPAddr).Port))
	// Threads that are there before, and block to the end.
	for range 4 {
		r, _, err := os.Pipe()
		if err != nil {
			return err
		}
		go func() { _, _ = unix.Read(int(r.Fd()), make([]byte, 1)) }()
	}
	if _, err := q.Room.Enter(); err != nil {
		return err
	}
	out := make(map[string]string)
	for _, t := range q.Try {
		said := make(map[string]bool)
		var mu sync.Mutex
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				s := "done"
				if err := tried[t[0]](t[1]); err != nil {
					s = err.Error()
				}
				mu.Lock()
				defer mu.Unlock()
				said[s] = true
			})
			if t[0] == "rename" || t[0] == "accept" {
				break // it can be done once
			}
		}
		wg.Wait()
		for s := range said {
			out[t[0]+" "+t[1]] += s
		}
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}

func enter(t *testing.T, room confine.Room, try [][2]string) (map[string]string, error) {
	t.Helper()
	q, err := json.Marshal(map[string]any{"Room": room, "Try": try})
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "CONFINE_ROOM="+string(q))
	b, err := cmd.Output()
	if x, ok := errors.AsType[*exec.ExitError](err); ok {
		return nil, errors.New(string(x.Stderr))
	}
	if err != nil {
		t.Fatal(err)
	}
	var out map[string]string
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return out, nil
}

// TestEnter: a daemon keeps what its room has, on every thread, and nothing else.
func TestEnter(t *testing.T) {
	dir := t.TempDir()
	for _, sub := range []string{"read", "write", "other"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, sub, "file"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open := func(network, at string) net.Listener {
		l, err := net.Listen(network, at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_ = c.Close() // that it was made is all
			}
		}()
		return l
	}
	allowed, other, socket := open("tcp", "127.0.0.1:0"), open("tcp", "127.0.0.1:0"), open("unix", filepath.Join(dir, "s"))
	path := func(p ...string) string { return filepath.Join(append([]string{dir}, p...)...) }
	room := confine.Room{Read: []string{path("read")}, Write: []string{path("write"), "/dev/null"}, Ports: []uint16{uint16(allowed.Addr().(*net.TCPAddr).Port)}}
	me := strconv.Itoa(os.Getpid())
	rows := [][3]string{
		{"read", path("read", "file"), "done"}, {"read", path("other", "file"), "permission denied"}, {"read", "/etc/passwd", "permission denied"},
		{"write", path("write", "new"), "done"}, {"rename", path("write", "file"), "done"}, {"write", path("read", "file"), "permission denied"}, {"write", path("new"), "permission denied"},
		{"dial", allowed.Addr().String(), "done"}, {"dial", other.Addr().String(), "permission denied"}, {"accept", "", "done"},
		{"unix", socket.Addr().String(), "operation not permitted"}, {"listen", "", "operation not permitted"}, {"udp", "", "operation not permitted"}, {"mptcp", "", "operation not permitted"},
		{"route", "", "operation not permitted"}, {"route6", "", "operation not permitted"}, {"route62", "", "operation not permitted"}, {"ttl", "", "done"},
		{"run", "/bin/true", "operation not permitted"}, {"ptrace", me, "operation not permitted"}, {"signal", me, "operation not permitted"}, {"environ", me, "permission denied"},
	}
	var try [][2]string
	for _, r := range rows {
		try = append(try, [2]string{r[0], r[1]})
	}
	out, err := enter(t, room, try)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		if got := out[r[0]+" "+r[1]]; !strings.Contains(got, r[2]) {
			t.Errorf("%s %s: got %q, want %s", r[0], r[1], got, r[2])
		}
	}
	// What it starts is confined as it is.
	room.Execute = []string{"/bin", "/usr", "/lib", "/lib64"}
	room.Unix = []string{socket.Addr().String()}
	out, err = enter(t, room, [][2]string{{"run", "/bin/true"}, {"unix", socket.Addr().String()}, {"read", path("other", "file")}})
	if err != nil {
		t.Fatal(err)
	}
	if out["run /bin/true"] != "done" || out["unix "+socket.Addr().String()] != "done" || !strings.Contains(out["read "+path("other", "file")], "permission denied") {
		t.Errorf("with programs and a socket: %v", out)
	}
}

// TestEnterRefuses: a room that cannot be made is no room.
func TestEnterRefuses(t *testing.T) {
	for want, room := range map[string]confine.Room{"no such file": {Read: []string{"/nowhere"}}, "there is no part": {Optional: []confine.Part{"everything"}}} {
		if _, err := enter(t, room, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want something about %q", err, want)
		}
	}
}
