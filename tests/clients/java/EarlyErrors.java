// Errors that the server sends while a large body is still being sent: ../python/early_errors.py for Java's own client.
// Run as a single source file: java EarlyErrors.java

import java.io.ByteArrayInputStream;
import java.io.InputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.time.Duration;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.function.Supplier;
import java.util.stream.Collectors;

class EarlyErrors {
    static final byte[] BODY = new byte[32 << 20];
    static final int REPETITIONS = 2;
    static final String KEY = System.getenv("RERANKD_KEY");

    record Case(String column, String server, String path, String key, int status, String message, boolean hasRetryAfter) {}

    static final Case[] CASES = {
        new Case("401", "CLOSED", "/v1/rerank", "a-wrong-key", 401, "Invalid token", false),
        new Case("404", "CLOSED", "/no/such/path", KEY, 404, "does not exist", false),
        new Case("413", "CLOSED", "/v1/rerank", KEY, 413, "more than", false),
        new Case("503 memory", "FULL", "/v1/rerank", KEY, 503, "overloaded", true),
        new Case("503 connections", "CAPPED", "/v1/rerank", KEY, 503, "overloaded", true),
    };

    public static void main(String[] arguments) {
        Arrays.fill(BODY, (byte) ' ');
        check("java.net.http, buffered", () -> BodyPublishers.ofByteArray(BODY));
        check("java.net.http, streamed", () -> BodyPublishers.ofInputStream(() -> slow(new ByteArrayInputStream(BODY))));
        System.exit(0);
    }

    /** A stream that pauses, so that the error is sent before the last byte. */
    static InputStream slow(InputStream stream) {
        return new InputStream() {
            @Override
            public int read() {
                throw new UnsupportedOperationException();
            }

            @Override
            public int read(byte[] bytes, int offset, int length) throws java.io.IOException {
                try {
                    if (stream.available() % (1 << 20) == 0) Thread.sleep(5);
                } catch (InterruptedException error) {
                    throw new java.io.IOException(error);
                }
                return stream.read(bytes, offset, length);
            }
        };
    }

    static void check(String client, Supplier<BodyPublisher> body) {
        Map<String, String> cells = new LinkedHashMap<>();
        for (Case one : CASES) {
            try {
                for (int i = 0; i < REPETITIONS; i++) run(one, body.get());
                cells.put(one.column, cell("ok", ""));
            } catch (Exception error) {
                cells.put(one.column, cell("FAIL", String.valueOf(error)));
            }
        }
        String joined = cells.entrySet().stream().map(e -> quote(e.getKey()) + ":" + e.getValue()).collect(Collectors.joining(","));
        String version = "Java " + System.getProperty("java.version");
        System.out.println("{\"client\":" + quote(client) + ",\"version\":" + quote(version) + ",\"cells\":{" + joined + "}}");
    }

    static void run(Case one, BodyPublisher body) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(System.getenv("RERANKD_" + one.server) + one.path))
            .timeout(Duration.ofSeconds(60))
            .header("Authorization", "Bearer " + one.key)
            .header("Content-Type", "application/json")
            .POST(body)
            .build();
        HttpResponse<String> answer = HttpClient.newHttpClient().send(request, BodyHandlers.ofString());
        String text = answer.body();
        if (answer.statusCode() != one.status) throw new Exception("status " + answer.statusCode());
        if (!text.startsWith("{") || !text.endsWith("}") || !text.contains(one.message)) throw new Exception("body " + text);
        boolean hasRetryAfter = answer.headers().firstValue("retry-after").isPresent();
        if (hasRetryAfter != one.hasRetryAfter) throw new Exception("Retry-After: " + hasRetryAfter);
    }

    static String cell(String state, String note) {
        return "{\"state\":" + quote(state) + ",\"note\":" + quote(note) + "}";
    }

    static String quote(String text) {
        return '"' + text.replace("\\", "\\\\").replace("\"", "\\\"").replaceAll("\\s+", " ") + '"';
    }
}
