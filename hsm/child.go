package hsm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
)

// child is the parent's side of one worker process: one generation.
type child struct {
	generation uint64
	cmd        *exec.Cmd
	conn       net.Conn
	write      sync.Mutex
	gone       chan struct{} // closed when the connection or the process ended

	mu       sync.Mutex
	next     uint64
	pending  map[uint64]chan response
	throttle int // answers of classThrottle in a row
}

// startChild starts a worker. Its end is tied to the connection's: it leaves
// when the parent does, whatever its module is doing.
func startChild(command, env []string, generation uint64) (*child, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("starting the PKCS#11 worker: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "worker"), os.NewFile(uintptr(fds[1]), "parent")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		return nil, fmt.Errorf("starting the PKCS#11 worker: %w", err)
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.ExtraFiles = []*os.File{theirs} // descriptor 3
	for _, v := range append(os.Environ(), env...) {
		// The service manager's descriptors and credentials are not the vendor's.
		if name, _, _ := strings.Cut(v, "="); name != "CREDENTIALS_DIRECTORY" && name != "NOTIFY_SOCKET" && !strings.HasPrefix(name, "LISTEN_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	if err := cmd.Start(); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("starting the PKCS#11 worker: %w", err)
	}
	c := &child{generation: generation, cmd: cmd, conn: conn, gone: make(chan struct{}), pending: map[uint64]chan response{}}
	go c.read()
	return c, nil
}

func (c *child) read() {
	r := bufio.NewReader(c.conn)
	for {
		var a response
		if err := readFrame(r, &a); err != nil {
			break
		}
		c.mu.Lock()
		ch := c.pending[a.ID]
		delete(c.pending, a.ID)
		c.mu.Unlock()
		if ch == nil {
			continue // the caller gave up
		}
		ch <- a
	}
	_ = c.conn.Close()
	close(c.gone)
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait() // no zombie; how it ended is of no use to anyone
}

// kill ends the worker at once; read then cleans up.
func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	_ = c.conn.Close()
}

// call sends a request and waits for its answer, or for the end of ctx or worker.
func (c *child) call(ctx context.Context, q request) (*response, error) {
	ch := make(chan response, 1)
	c.mu.Lock()
	c.next++
	q.ID = c.next
	c.pending[q.ID] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, q.ID)
		c.mu.Unlock()
	}()
	c.write.Lock()
	limit, _ := ctx.Deadline()
	_ = c.conn.SetWriteDeadline(limit) // a hung worker does not read
	err := writeFrame(c.conn, &q)
	c.write.Unlock()
	if err != nil {
		return nil, ErrWorker
	}
	select {
	case a := <-ch:
		return &a, answerError(q.Op, &a)
	case <-c.gone:
		return nil, ErrWorker
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func answerError(op string, a *response) error {
	switch {
	case a.Code != 0:
		return &CodeError{a.Code, op}
	case a.Missing:
		return fmt.Errorf("%w: %s", ErrNotFound, a.Error)
	case a.Error != "":
		return errors.New(op + ": " + a.Error)
	}
	return nil
}
