package simulator

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// PostgreSQL is a running server with one database, inkan, and a user of that
// name. It listens on a unix socket in its own directory and nowhere else,
// unless Listen is called. Its methods are not for concurrent use.
type PostgreSQL struct {
	Dir      string // holds data, socket and log
	Password string // of the user inkan

	bin       string
	as        *syscall.Credential // nil: as this process
	child     *child
	port      int // of TCP; 0: none
	arguments []string
}

// postgresUser is who Debian's package makes for its servers. The server
// refuses to run as root.
const postgresUser = "postgres"

// postgresReady bounds how long a server may take to accept connections, which
// after a crash it does when it has replayed its log.
const postgresReady = 30 * time.Second

// StartPostgreSQL starts a server whose data is in dir, which is made if need
// be. Everything that it acknowledges is on disk (fsync, full_page_writes and
// synchronous_commit are on). It ends with this process, however that ends.
func StartPostgreSQL(ctx context.Context, dir string) (*PostgreSQL, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	p := &PostgreSQL{Dir: dir, Password: rand.Text()}
	if len(p.socket()) > maxSocketPath {
		return nil, fmt.Errorf("starting PostgreSQL: the path %s is too long for a unix socket: choose a shorter directory", p.socket())
	}
	if p.bin, err = postgresPrograms(); err != nil {
		return nil, err
	}
	if p.as, err = postgresCredential(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if p.as != nil {
		if err := os.Chown(dir, int(p.as.Uid), int(p.as.Gid)); err != nil {
			return nil, err
		}
	}
	if _, err := os.Stat(p.data()); errors.Is(err, os.ErrNotExist) {
		if err := p.initialise(ctx); err != nil {
			return nil, fmt.Errorf("making a PostgreSQL cluster: %w", err)
		}
	} else if b, err := os.ReadFile(p.passwordFile()); err != nil {
		return nil, err
	} else {
		p.Password = strings.TrimSpace(string(b))
	}
	return p, p.Restart()
}

// postgresPrograms finds the newest server that is installed: Debian keeps its
// programs out of PATH, below a directory for each version.
func postgresPrograms() (string, error) {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb") // the pattern is valid
	version := func(path string) int {
		n, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(path)))) // 0: not one of Debian's
		return n
	}
	if len(found) == 0 {
		return "", fmt.Errorf("starting PostgreSQL: %w: apt-get install postgresql", ErrMissing)
	}
	return filepath.Dir(slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) })), nil
}

func postgresCredential() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup(postgresUser)
	if err != nil {
		return nil, fmt.Errorf("starting PostgreSQL: it refuses to run as root, and there is no user %s: %w: apt-get install postgresql", postgresUser, ErrMissing)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

func (p *PostgreSQL) data() string         { return filepath.Join(p.Dir, "data") }
func (p *PostgreSQL) passwordFile() string { return filepath.Join(p.Dir, "password") }
func (p *PostgreSQL) socket() string       { return filepath.Join(p.Dir, ".s.PGSQL.5432") }

// initialise makes the cluster and the database.
func (p *PostgreSQL) initialise(ctx context.Context) error {
	if err := os.WriteFile(p.passwordFile(), []byte(p.Password+"\n"), 0o600); err != nil {
		return err
	}
	if p.as != nil {
		if err := os.Chown(p.passwordFile(), int(p.as.Uid), int(p.as.Gid)); err != nil {
			return err
		}
	}
	// What initdb makes can be made again, so it need not be on disk yet.
	if err := p.tool(ctx, "", "initdb", "--pgdata", p.data(), "--no-sync", "--encoding", "UTF8", "--locale", "C", "--username", "inkan", "--auth", "scram-sha-256", "--pwfile", p.passwordFile()); err != nil {
		return err
	}
	conf, err := os.OpenFile(filepath.Join(p.data(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	// Dynamic shared memory is in the data directory, where nothing of it outlives a test.
	_, err = conf.WriteString("fsync = on\nfull_page_writes = on\nsynchronous_commit = on\nmax_connections = 64\nshared_buffers = 16MB\ndynamic_shared_memory_type = mmap\n")
	if err := errors.Join(err, conf.Close()); err != nil {
		return err
	}
	return p.tool(ctx, "CREATE DATABASE inkan;\n", "postgres", "--single", "-D", p.data(), "template1")
}

// tool runs one of PostgreSQL's programs to its end.
func (p *PostgreSQL) tool(ctx context.Context, input, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(p.bin, name), args...)
	cmd.Dir, cmd.Stdin = p.Dir, strings.NewReader(input)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.as}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// URL is where the database is, with the password in it.
func (p *PostgreSQL) URL() string {
	u := url.URL{Scheme: "postgres", User: url.UserPassword("inkan", p.Password), Path: "/inkan", RawQuery: url.Values{"host": {p.Dir}}.Encode()}
	return u.String()
}

// Listen makes the server listen on 127.0.0.1 too, for TLS alone, with a
// certificate and its key in PEM, and restarts it. It returns host:port.
func (p *PostgreSQL) Listen(certificate, key []byte) (string, error) {
	for name, b := range map[string][]byte{"server.pem": certificate, "server.key": key} {
		path := filepath.Join(p.Dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			return "", err
		}
		if p.as != nil {
			if err := os.Chown(path, int(p.as.Uid), int(p.as.Gid)); err != nil {
				return "", err
			}
		}
	}
	hba := "local all all scram-sha-256\nhostssl all all 127.0.0.1/32 scram-sha-256\n"
	if err := os.WriteFile(filepath.Join(p.data(), "pg_hba.conf"), []byte(hba), 0o600); err != nil {
		return "", err
	}
	free, err := FreePorts(1)
	if err != nil {
		return "", err
	}
	if p.port, err = portOf(free[0]); err != nil {
		return "", err
	}
	if err := p.Close(); err != nil {
		return "", err
	}
	p.arguments = []string{"-c", "listen_addresses=127.0.0.1", "-c", "port=" + strconv.Itoa(p.port), "-c", "ssl=on",
		"-c", "ssl_cert_file=" + filepath.Join(p.Dir, "server.pem"), "-c", "ssl_key_file=" + filepath.Join(p.Dir, "server.key")}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(p.port)), p.Restart()
}

// Restart starts the server if it does not run, with all that it had
// acknowledged before Kill or Close, and returns when it accepts connections.
func (p *PostgreSQL) Restart() error {
	limit := time.Now().Add(postgresReady)
	for {
		err := p.start()
		// Processes of a server that was killed end a little later than it
		// does, and as long as one is there no other server starts.
		if err == nil || !strings.Contains(err.Error(), "is still in use") || time.Now().After(limit) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (p *PostgreSQL) start() error {
	if p.child != nil && p.child.running() {
		return nil
	}
	args := append([]string{"-D", p.data(), "-k", p.Dir, "-c", "listen_addresses="}, p.arguments...)
	if err := p.unlockDead(); err != nil {
		return err
	}
	log := filepath.Join(p.Dir, "postgres.log")
	if err := os.Remove(log); err != nil && !errors.Is(err, os.ErrNotExist) { // what a failed start reports is its own
		return err
	}
	c, err := startChildAs(p.as, p.Dir, log, nil, filepath.Join(p.bin, "postgres"), args...)
	if err != nil {
		return err
	}
	p.child = c
	return c.waitUntil(postgresReady, func() bool { // the last line says so
		b, err := os.ReadFile(filepath.Join(p.data(), "postmaster.pid"))
		if err != nil {
			return false
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		return lines[0] == strconv.Itoa(c.cmd.Process.Pid) && strings.TrimSpace(lines[len(lines)-1]) == "ready"
	})
}

// unlockDead removes the locks of a server that ended together with the process
// that started it: where nobody waits for such orphans, their number stays taken.
func (p *PostgreSQL) unlockDead() error {
	lock := filepath.Join(p.data(), "postmaster.pid")
	b, err := os.ReadFile(lock)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	pid, _, _ := strings.Cut(string(b), "\n")
	status, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil || !strings.Contains(string(status), ") Z ") {
		return nil // it runs, or the server sees by itself that it does not
	}
	if err := os.Remove(p.socket() + ".lock"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Remove(lock)
}

// PID of the server's first process, the parent of the others.
func (p *PostgreSQL) PID() int { return p.child.cmd.Process.Pid }

// Kill ends the server as a crash of the host would, all its processes at once.
// The others would end by themselves when they see that the first one is gone, but
// until then they answer on connections that stand.
func (p *PostgreSQL) Kill() error {
	others, err := p.children()
	if err != nil {
		return err
	}
	if err := p.child.end(syscall.SIGKILL); err != nil {
		return err
	}
	for _, pid := range others {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	for limit := time.Now().Add(postgresReady); slices.ContainsFunc(others, runs); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			return errors.New("processes of the killed server do not end")
		}
	}
	return nil
}

// children are the server's other processes.
func (p *PostgreSQL) children() ([]int, error) {
	if p.child == nil || !p.child.running() {
		return nil, nil
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.PID()))
	if err != nil {
		return nil, err
	}
	var out []int
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			return nil, err
		}
		for _, field := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return nil, err
			}
			out = append(out, pid)
		}
	}
	return out, nil
}

// runs: there is such a process, and it is more than a number that nobody has waited for.
func runs(pid int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(status), ") Z ")
}

// Close shuts the server down in order; connections are closed.
func (p *PostgreSQL) Close() error {
	if p.child == nil {
		return nil
	}
	return errors.Join(p.child.end(syscall.SIGINT), p.release())
}

// release removes the few bytes of System V shared memory that a killed server
// left behind; a server that ended in order removes them, and the file that names them.
func (p *PostgreSQL) release() error {
	b, err := os.ReadFile(filepath.Join(p.data(), "postmaster.pid"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	if len(lines) < 7 {
		return nil
	}
	fields := strings.Fields(lines[6]) // key and identifier
	if len(fields) != 2 {
		return nil
	}
	id, err := strconv.Atoi(fields[1])
	if err != nil {
		return err
	}
	const remove = 0 // IPC_RMID
	if _, _, errno := syscall.Syscall(syscall.SYS_SHMCTL, uintptr(id), remove, 0); errno != 0 && errno != syscall.EINVAL && errno != syscall.EIDRM {
		return fmt.Errorf("removing shared memory: %w", errno)
	}
	return nil
}
